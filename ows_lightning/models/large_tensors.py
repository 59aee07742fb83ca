"""Work on large tensors without large temporaries; mapped files, whose pages count as memory from reading to release."""

import mmap
import weakref
from typing import BinaryIO

import torch
from torch import Tensor

# Of the whole process: code that reads weights does not know which file they lie in.
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def rows_at_a_time(elements: int, device: torch.device) -> int:
    """Returns how many rows of ``elements`` (0 or more) elements to work on at a time, at least 1."""
    # Their float32 copies take 4 MB on a CPU, whose cache holds them, and 16 MB on a GPU, which wants fewer, larger kernels.
    return max(1, (1 << (22 if device.type == "cuda" else 20)) // max(1, elements))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; `isfinite` would need memory for a copy of it, and this needs none."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def map_file(file: BinaryIO, writable: bool, start: int = 0, length: int = 0) -> mmap.mmap:
    """Maps ``length`` bytes (0: all) of a file from ``start``, a page's first; if ``writable``, it keeps what is written."""
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY  # torch warns about memory that it can't write
    memory = mmap.mmap(file.fileno(), length, access=access, offset=start)
    _maps.add(memory)
    return memory


def release_mapped_pages() -> None:
    """Frees the memory of all mapped pages that were read; whoever reads many weights calls it after each."""
    for memory in list(_maps):
        memory.madvise(mmap.MADV_DONTNEED)
