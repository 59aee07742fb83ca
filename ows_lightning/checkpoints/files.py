"""Files of tensors and plain values: written whole, checked for changed bytes, and read without running code.

torch writes a zip archive, whose own checksums do not cover headers and padding. So the CRC-32 of the whole file is stored as
the archive's comment, which torch and zip tools ignore. Those of a directory of shards are in its ``meta.pt``.
"""

import functools
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ows_lightning.errors import UsageError
from ows_lightning.models.large_tensors import release_mapped_pages

META_FILE = "meta.pt"  # Lightning's name for what is in a sharded checkpoint beside the shards
DCP_METADATA_FILE = ".metadata"  # torch's name for the list of what is in the shards
REQUIRED_KEYS = ("state_dict", "loops", "global_step")
# What torch and pickle raise on a file that is truncated or not a checkpoint.
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError)
UNSAFE = "it holds more than tensors and plain values, which could run code when it is read"
_CHECKSUM = b"sum32 %08x"
_COMMENT_LENGTH = len(_CHECKSUM % 0).to_bytes(2, "little")  # the archive's last two bytes, which are 0 without a comment
_READ_BYTES = 1 << 22


def load_file(path: Path, needed: Iterable[str] = REQUIRED_KEYS) -> dict[str, Any]:
    """Reads a file of tensors and plain values, whose checksum is verified first; tensors are memory-mapped."""
    verified = verify_checksum(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if zipfile.is_zipfile(path):
            raise
        raise ValueError("it is cut short, or was not written by torch") from error
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(UNSAFE) from error
    if missing := [key for key in needed if key not in checkpoint]:
        raise ValueError(f"it has no {missing[0]}")
    if checkpoint.pop("has_checksum", False) and not verified:
        raise ValueError("its checksum is lost: bytes have changed since it was written")
    return checkpoint


def save_file(value: dict[str, Any], path: Path) -> None:
    """Writes a file with its checksum, and flushes it to the disk; a UsageError if `load_file` would refuse what is in it."""
    with ChecksummedFile(path) as file:
        try:
            torch.save({**value, "has_checksum": True}, file)
        except RuntimeError as error:
            raise root_cause(error) from error
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_LENGTH + _CHECKSUM % file.crc32)
        file.flush()
        os.fsync(file.fileno())
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        hint = "hand over numbers and text of Python's own (also as rates), or leave it out of save_hyperparameters"
        raise UsageError(f"the checkpoint holds {', '.join(sorted(unsafe))}, with which no run can be resumed; {hint}")


def root_cause(error: BaseException) -> BaseException:
    """The error behind one of torch's: that of the first failed process, or the one that kept a file from being finished."""
    if isinstance(error, dcp.CheckpointException):
        return root_cause(next(iter(error.failures.values()))[0])
    return error.__context__ if isinstance(error.__context__, (OSError, KeyboardInterrupt)) else error


class ChecksummedFile(io.BufferedWriter):
    """A file for ``torch.save`` to write to, which sums up what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.crc32 = 0

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self.crc32 = zlib.crc32(data, self.crc32)
        written = super().write(data)
        release_mapped_pages()  # of the weight that was written
        return written


def file_crc32(path: Path, length: int | None = None) -> int:
    """The CRC-32 of a file, or of its first ``length`` bytes; read once as long as the file stays as it is."""
    about = path.stat()
    return _cached_crc32(path, about.st_size if length is None else length, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=1024)
def _cached_crc32(path: Path, left: int, *_: int) -> int:
    total = 0
    with path.open("rb") as file:
        while left and (data := file.read(min(_READ_BYTES, left))):
            total, left = zlib.crc32(data, total), left - len(data)
    return total


def verify_checksum(path: Path) -> bool:
    """Whether an archive has a comment with its sum; a ValueError says that the file has changed."""
    end = path.stat().st_size - len(_COMMENT_LENGTH + _CHECKSUM % 0)
    with path.open("rb") as file:
        file.seek(max(end, 0))
        length, comment = file.read(2), file.read()
    found = re.fullmatch(rb"sum32 ([0-9a-f]{8})", comment)
    if found and (length != _COMMENT_LENGTH or int(found[1], 16) != zlib.crc32(b"\0\0", file_crc32(path, end))):
        raise ValueError("its checksum is wrong: bytes have changed since it was written")
    return found is not None
