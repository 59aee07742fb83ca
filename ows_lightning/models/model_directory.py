"""Directories that hold a model: which of them may be replaced, and how one appears as a whole."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CHAT_TEMPLATE_DIR

from ows_lightning.atomic_files import partial_path, replace_atomically
from ows_lightning.errors import RunError, StrPath, UsageError, refuse_url, typed_path
from ows_lightning.models.source import DELTA_FILE

# Names of files in a Hugging Face model directory; nothing else is ever replaced or removed.
MODEL_FILES = (
    DELTA_FILE, "README.md", "LICENSE*", ".gitattributes", "*.safetensors", "*.safetensors.index.json", "*config.json",
    "*token*.json", "*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model", CHAT_TEMPLATE_DIR,
)  # fmt: skip


def check_replaceable(directory: StrPath, *sources: StrPath) -> Path:
    """Returns the resolved path if a model or a delta may replace what is there: nothing, or a model, and no source."""
    refuse_url("output", directory)
    target = typed_path(directory).resolve()
    if not target.exists():
        return target
    if target == Path.cwd() or target.is_mount():
        what = "the current folder or a mount point, which"
        raise UsageError(f"'{directory}' is {what} can't be replaced; give a new directory in it")
    if target in (typed_path(source).resolve() for source in sources):
        raise UsageError(f"{str(target)!r} is what the result is made from, and would be replaced; give another directory")
    if not target.is_dir():
        raise UsageError(f"{str(target)!r} is a file; give a directory to write the model to")
    foreign = [p.name for p in target.iterdir() if not is_of_model(p) or (p.is_dir() and p.name != CHAT_TEMPLATE_DIR)]
    if foreign or (any(target.iterdir()) and not (target / "config.json").is_file()):
        what = f"holds {foreign[0]!r}, which is no part of a model" if foreign else "holds something else than a model"
        raise UsageError(f"{str(target)!r} {what}, and would be replaced; give a new directory")
    return target


def is_of_model(path: Path) -> bool:
    """Whether a file or folder is one that model directories have; Python files where the config names code."""
    if path.suffix != ".py":
        return any(map(path.match, MODEL_FILES))
    config = path.with_name("config.json")
    return config.is_file() and "auto_map" in config.read_text(encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(target: Path, what: str) -> Iterator[Path]:
    """Yields an empty folder that replaces the target in the end, or is removed after an error; a full disk is a RunError."""
    partial = partial_path(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.glob("*.safetensors"):  # safetensors gives them to their owner alone
            file.chmod((partial / "config.json").stat().st_mode)
        replace_atomically(partial, target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"can't write the {what} to {str(target)!r} ({error}); free space or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
