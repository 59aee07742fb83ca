"""Checksums of checkpoints: any byte that changes after a checkpoint was written is found before anything of it is used.

A file that torch writes is a zip archive; the CRC-32 of all of it stands behind it, as the archive's comment, which torch and
zip tools pass over. The sums of the other files of a directory of shards are in its ``meta.pt``.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ows_lightning.models.mapped_files import drop_page_cache

_COMMENT = b"crc32 %08x"
_LENGTH = len(_COMMENT % 0)
_CHUNK = 1 << 22


class SummedFile:
    """What ``torch.save`` writes to, which adds the sum at the end.

    Args:
        file: Open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sum = 0
        self._end = b""  # the last two bytes: in an archive's end, the length of its comment

    def write(self, data: Any) -> int:
        """Writes bytes."""
        view = memoryview(data).cast("B")
        if len(view) < 2:
            self._end += bytes(view)
            self._put(self._end[:-2])
            self._end = self._end[-2:]
        else:
            self._put(self._end)
            self._put(view[:-2])
            self._end = bytes(view[-2:])
        drop_page_cache()  # of the weight that was written
        return len(view)

    def flush(self) -> None:
        """Does nothing: the file is flushed by its owner."""

    def close(self) -> None:
        """Writes the comment with the sum; the file itself stays open."""
        self._put(_LENGTH.to_bytes(2, "little"))
        self._file.write(_COMMENT % self._sum)

    def _put(self, data: bytes | memoryview) -> None:
        self._sum = zlib.crc32(data, self._sum)
        self._file.write(data)


def file_sum(path: Path, length: int | None = None) -> int:
    """The CRC-32 of a file, or of its first ``length`` bytes."""
    total, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while left and (data := file.read(min(_CHUNK, left))):
            total = zlib.crc32(data, total)
            left -= len(data)
    return total


def check_sum(path: Path) -> bool:
    """Compares a file with the sum at its end; read once as long as the file stays as it is.

    Returns:
        Whether it has a sum.

    Raises:
        ValueError: The file has changed.
    """
    about = path.stat()
    return _check_sum(path, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=64)
def _check_sum(path: Path, size: int, *_: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(size - _LENGTH, 0))
        found = re.fullmatch(rb"crc32 ([0-9a-f]{8})", file.read())
    if found and int(found[1], 16) != file_sum(path, size - _LENGTH):
        raise ValueError("its checksum is wrong: bytes have changed since it was written")
    return found is not None


def check_sums(folder: Path, sums: Mapping[str, int]) -> None:
    """Compares files of a folder with their sums.

    Raises:
        ValueError: One has changed.
        OSError: One is not there.
    """
    for name, expected in sums.items():
        about = (folder / name).stat()
        if _file_sum(folder / name, about.st_size, about.st_mtime_ns, about.st_ino) != expected:
            raise ValueError(f"{name} has another checksum than when it was written")


@functools.lru_cache(maxsize=1024)
def _file_sum(path: Path, *_: int) -> int:
    return file_sum(path)
