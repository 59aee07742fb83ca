"""``configs``: lists the config files that come with this package."""

from ows_lightning.cli.config_files import shipped_configs
from ows_lightning.cli.help import CommandParser


def configs(argv: list[str]) -> None:
    """Prints each with its first line, which says what it is for."""
    CommandParser("configs", "List the config files that come with this package; `--config NAME` takes one.").parse_args(argv)
    for name, path in shipped_configs():
        print(f"{name:<26} {path.read_text().splitlines()[0].removeprefix('# ')}")
