"""Checksums of checkpoints: any byte that changes after a checkpoint was written is found before anything of it is used.

A file that torch writes is a zip archive, whose own sums leave out headers and padding. So the CRC-32 of all of it is at its
end, as the archive's comment, which torch and zip tools pass over. The sums of the other files of a directory of shards are in
its ``meta.pt``.
"""

from __future__ import annotations

import functools
import io
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ows_lightning.models.large_tensors import drop_page_cache

_COMMENT = b"sum32 %08x"
_LENGTH = len(_COMMENT % 0).to_bytes(2, "little")  # the archive's last two bytes, which are 0 without a comment
_CHUNK = 1 << 22


class SummedFile(io.BufferedWriter):
    """A file for ``torch.save`` to write to, which sums up what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._sum = 0

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self._sum = zlib.crc32(data, self._sum)
        written = super().write(data)
        drop_page_cache()  # of the weight that was written
        return written

    def add_comment(self) -> None:
        """Ends the archive with a comment that holds the sum."""
        self.seek(-2, os.SEEK_END)
        super().write(_LENGTH + _COMMENT % self._sum)


def file_sum(path: Path, length: int | None = None) -> int:
    """The CRC-32 of a file, or of its first ``length`` bytes; read once as long as the file stays as it is."""
    about = path.stat()
    return _file_sum(path, about.st_size if length is None else length, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=1024)
def _file_sum(path: Path, left: int, *_: int) -> int:
    total = 0
    with path.open("rb") as file:
        while left and (data := file.read(min(_CHUNK, left))):
            total = zlib.crc32(data, total)
            left -= len(data)
    return total


def check_comment(path: Path) -> bool:
    """Whether an archive has a comment with its sum; a ValueError says that the file has changed."""
    end = path.stat().st_size - len(_LENGTH + _COMMENT % 0)
    with path.open("rb") as file:
        file.seek(max(end, 0))
        length, comment = file.read(2), file.read()
    found = re.fullmatch(rb"sum32 ([0-9a-f]{8})", comment)
    if found and (length != _LENGTH or int(found[1], 16) != zlib.crc32(b"\0\0", file_sum(path, end))):
        raise ValueError("its checksum is wrong: bytes have changed since it was written")
    return found is not None


def check_sums(folder: Path, sums: Mapping[str, int]) -> None:
    """Raises a ValueError if files of a folder have other sums than these, an OSError if one is not there."""
    for name, expected in sums.items():
        if file_sum(folder / name) != expected:
            raise ValueError(f"{name} has another checksum than when it was written")
