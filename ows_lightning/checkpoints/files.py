"""Files of tensors and plain values: written whole, read without running code."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ows_lightning.checkpoints.checksums import SummedFile, check_comment

META = "meta.pt"  # Lightning's name for what is in a sharded checkpoint beside the shards
METADATA = ".metadata"  # torch's name for the list of what is in the shards
REQUIRED_KEYS = ("state_dict", "loops", "global_step")
# What torch and pickle raise on a file that is truncated or not a checkpoint.
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError)


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for more than tensors and plain values."""

    def __str__(self) -> str:
        return "it holds more than tensors and plain values, which could run code when it is read"


def load_file(path: Path, needed: Iterable[str] = REQUIRED_KEYS) -> dict[str, Any]:
    """Reads a file of tensors and plain values, whose checksum is verified first; tensors are memory-mapped."""
    summed = check_comment(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # the bytes are not a pickle at all
            raise ValueError("it was not written by torch") from error
        raise UnsafePickleError from error
    if missing := [key for key in needed if key not in checkpoint]:
        raise ValueError(f"it has no {missing[0]}")
    if checkpoint.pop("has_checksum", False) and not summed:
        raise ValueError("its checksum is lost: bytes have changed since it was written")
    return checkpoint


def save_file(value: dict[str, Any], path: Path) -> None:
    """Writes a file of tensors and plain values with its checksum, and flushes it to the disk."""
    with SummedFile(path) as file:
        try:
            torch.save({**value, "has_checksum": True}, file)
        except RuntimeError as error:
            raise root_cause(error) from error
        file.add_comment()
        file.flush()
        os.fsync(file.fileno())


def partial_path(path: Any) -> Path:
    """The temporary name of a checkpoint that is being written, or removed."""
    return Path(path).with_name(f".{Path(path).name}.partial")


def replace_atomically(partial: Path, path: Path) -> None:
    """Renames a finished file or directory to its final name; a directory that it replaces is ``.NAME.old`` meanwhile."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if partial.is_dir():
        for written in (*partial.iterdir(), partial):
            _fsync(written)
    if path.is_dir():
        path.rename(old)
    partial.replace(path)
    shutil.rmtree(old, ignore_errors=True)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def root_cause(error: BaseException) -> BaseException:
    """The error behind one of torch's: that of the first failed process, or the one that kept a file from being finished."""
    if isinstance(error, dcp.CheckpointException):
        return root_cause(next(iter(error.failures.values()))[0])
    return error.__context__ if isinstance(error.__context__, (OSError, KeyboardInterrupt)) else error


def first_line(error: BaseException) -> str:
    """An error's message, or the first line of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
