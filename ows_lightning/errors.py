"""The two errors that a user may cause, the words of their messages, and the paths that a user types."""

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

StrPath = str | os.PathLike[str]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(ValueError):
    """A setting or an input is wrong: the message names the key or the row, and how to fix it. Exit code 2."""


class RunError(RuntimeError):
    """A run that started well can't go on: the message says why, and what is left to resume from. Exit code 1."""


def command_line(command: str, *paths: object) -> str:
    """Returns how to type a command of this package, for messages: ``python main.py ...`` or ``ows-lightning ...``."""
    program = "python main.py" if Path(sys.argv[0]).name == "main.py" else "ows-lightning"
    return " ".join([program, command, *(shlex.quote(str(path)) for path in paths)])


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 200 characters, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def add_note(error: BaseException, note: str) -> None:
    """``BaseException.add_note``, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory, or the machine's, did not suffice."""
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())  # if it is imported
    words = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")
    return isinstance(error, of_torch) or any(text in str(error) for text in words)


def not_writable(key: str, folder: Path, error: OSError) -> UsageError:
    """Returns the error of a folder that can't be made or written to, which the key names."""
    hint = "free space or choose another folder" if error.errno in DISK_FULL else "choose another folder"
    return UsageError(f"{key}: can't write to '{folder}' ({error.strerror or error}); {hint}")


def refuse_url(key: str, folder: StrPath) -> None:
    """Raises a UsageError if a folder, which the key names, is an address such as ``s3://...``: it has to be a local one."""
    if re.match(r"\w{2,}:/", str(folder)):
        raise UsageError(f"{key}: '{folder}' is an address; give a local folder")


def typed_path(name: StrPath) -> Path:
    """The path that a user typed, with its ~ expanded; an unknown user's stays as it is, where pathlib raises."""
    return Path(os.path.expanduser(name))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean 'X'?`` with the nearest of the known names, or nothing."""
    return f"; did you mean '{near}'?" if (near := closest_name(name, known)) else ""


def closest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name most like ``name``, the first of equals (difflib gives the last); None below ``cutoff``."""
    likeness = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in sorted(known)}
    return max((other for other in likeness if likeness[other] >= cutoff), key=likeness.__getitem__, default=None)
