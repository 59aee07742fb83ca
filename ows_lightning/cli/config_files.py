"""Config files: how they are found and laid over their bases, and the checks before their keys are parsed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from ows_lightning.cli.help import CommandParser
from ows_lightning.errors import UsageError, did_you_mean

_PACKAGE = Path(__file__).parents[1]
SHIPPED_FOLDER = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent  # with configs/ and examples/
BASE = "base"  # the key of a config file that names its base, by a path relative to the file or a shipped one's name


class ConfigFile(ActionConfigFile):
    """``--config``: a file or the name of a shipped one, preceded by its bases."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Lays the file's bases that no earlier file has, and then the file, over what was given so far."""
        *bases, file = config_and_bases(str(values))
        laid = [Path(path.absolute) for path in namespace.get(self.dest) or []]
        for path in [*(base for base in bases if not any(map(base.samefile, laid))), file]:
            super().__call__(parser, namespace, str(path), option_string)


def config_and_bases(name: str) -> list[Path]:
    """Returns a config file and its bases, the lowest first; a UsageError if one is missing, no YAML, or its own base."""
    files = [find_config(name)]
    while (base := _read(files[0]).get(BASE)) is not None:
        path = find_config(str(base), files[0].parent)
        if any(map(path.samefile, files)):
            raise UsageError(f"config: {path} is its own base; delete its line `{BASE}:`")
        files.insert(0, path)
    return files


def find_config(name: str, folder: Path = Path()) -> Path:
    """Returns a config file by its path in a folder, or by a shipped one's name with or without its folder and ``.yaml``."""
    if "://" in name:
        raise UsageError(f"config: '{name}' is an address, and nothing is downloaded; give the path of a YAML file")
    path = os.path.join(folder, os.path.expanduser(name))  # where pathlib raises: no such user, too long a name
    if os.path.exists(path) and not (os.path.isdir(path) or Path(path).is_fifo()):
        return Path(path)
    shipped = dict(shipped_configs())
    short = name.removeprefix("configs/").removesuffix(".yaml")
    for key in (short, f"models/{short}", f"methods/{short}", f"strategies/{short}"):
        if key in shipped:
            return shipped[key]
    if os.path.exists(path):
        raise UsageError(f"config: '{name}' is a folder, or a pipe, which is read once only; give the path of a YAML file")
    hint = did_you_mean(short, shipped) or did_you_mean(short, (Path(key).name for key in shipped))
    hint = hint or "; give the path of a YAML file, or a name that `configs` lists"
    raise UsageError(f"config: no such file '{name}'{hint}")


def shipped_configs() -> Iterator[tuple[str, Path]]:
    """Yields the name and the path of each config file that comes with this package."""
    folder = SHIPPED_FOLDER / "configs"
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.relative_to(folder).parts), path)):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def shipped_data(name: Any) -> Any:
    """Replaces paths of shipped data and score files by the package's, where the working directory lacks them."""
    if isinstance(name, dict):  # from sources to their weights
        return {shipped_data(source): weight for source, weight in name.items()}
    if isinstance(name, list):
        return [shipped_data(source) for source in name]
    shipped = isinstance(name, str) and name.startswith(("examples/", "configs/scores/"))
    if shipped and not Path(name).exists() and (SHIPPED_FOLDER / name).exists():
        return str(SHIPPED_FOLDER / name)
    return name


def configs(argv: list[str]) -> None:
    """``configs``: the shipped files, each with its first line, which says what it is for."""
    CommandParser("configs", "List the config files that come with this package; `--config NAME` takes one.").parse_args(argv)
    for name, path in shipped_configs():
        print(f"{name:<26} {path.read_text().splitlines()[0].removeprefix('# ')}")


def _read(path: Path) -> dict[str, Any]:
    """Reads a file's keys and values, and refuses what the parser would misread or ignore."""
    try:
        loader = _Loader(text := path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_object(node, deep=True)  # refuses what holds itself
    except UnicodeDecodeError as error:
        raise UsageError(f"config: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config: {path}: {' '.join(str(error).split())}") from error
    if values is None:
        raise UsageError(f"config: {path} is empty; write keys and values into it")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"config: {path} is not a YAML file of keys and values: {' '.join(text.split())[:80]}")
    return values


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]  # as jsonargparse's
    """Refuses a key that is given twice, of which YAML would silently drop the first, and `yes` for a key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
                raise yaml.YAMLError(f"line {line}: YAML reads the key '{name}' as no text; put it in quotes")
            if name in lines and name != "<<":
                raise yaml.YAMLError(f"'{name}' on line {lines[name]} and again on line {line}; delete one")
            lines[name] = line
        return super().construct_mapping(node, deep)
