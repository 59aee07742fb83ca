"""Files and folders that appear under their names atomically: a kill leaves the old one, or the new."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any


def partial_path(path: Any) -> Path:
    """The temporary name of what is being written, or removed."""
    return Path(path).with_name(f".{Path(path).name}.partial")


def replace_atomically(partial: Path, path: Path) -> None:
    """Renames a finished file or directory to its final name.

    What it replaces is ``.NAME.old`` for a moment, if one of the two is a directory.
    """
    old = path.with_name(f".{path.name}.old")
    if partial.is_dir():
        for written in (*partial.rglob("*"), partial):
            _fsync(written)
    if path.is_dir() or (partial.is_dir() and os.path.lexists(path)):
        remove(old)
        path.rename(old)
    partial.replace(path)
    remove(old)
    _fsync(path.parent)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk; some network file systems can't flush a directory."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
