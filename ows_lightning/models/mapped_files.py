"""Files that weights are mapped from. Pages that were looked at count as the process's memory until they are let go."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor

_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_file(file: BinaryIO, writable: bool, start: int = 0, length: int = 0) -> mmap.mmap:
    """Maps a file.

    Args:
        file: An open file.
        writable: What is written into the mapping goes into the file; otherwise it is lost with the pages.
        start: First byte, a multiple of the page size.
        length: Bytes; 0 for the rest of the file.
    """
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY  # as torch does not map what it can't write
    memory = mmap.mmap(file.fileno(), length, access=access, offset=start)
    _maps.add(memory)
    return memory


def any_mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether one of these tensors, of any shapes, lies in a mapped file."""
    files = [(torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), len(memory)) for memory in _maps]
    return bool(files) and any(
        start <= t.data_ptr() < start + size for t in tensors if t.device.type == "cpu" for start, size in files
    )


def drop_page_cache() -> None:
    """Lets go of all pages that were looked at; whoever reads many weights calls it after each."""
    for memory in list(_maps):
        memory.madvise(mmap.MADV_DONTNEED)
