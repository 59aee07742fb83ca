"""Large tensors without large temporaries, and mapped files, whose pages that were read count as memory until released."""

import mmap
import weakref
from typing import BinaryIO

import torch
from torch import Tensor

# Of this process, as the pages are: what checks, exports or saves weights does not know which file they lie in.
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def rows_at_a_time(elements: int, device: torch.device) -> int:
    """How many rows to work on at a time: their float32 copies take 4 MB, as a CPU caches, or 16 on a GPU, for few kernels."""
    return max(1, (1 << (22 if device.type == "cuda" else 20)) // elements)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; `isfinite` would need memory for a copy of it, and this needs none."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def map_file(file: BinaryIO, writable: bool, start: int = 0, length: int = 0) -> mmap.mmap:
    """Maps ``length`` bytes of a file (0: the rest) from ``start``, a whole page; writes last if it is ``writable``."""
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY  # as torch does not map what it can't write
    memory = mmap.mmap(file.fileno(), length, access=access, offset=start)
    _maps.add(memory)
    return memory


def release_mapped_pages() -> None:
    """Frees the memory of all mapped pages that were read; whoever reads many weights calls it after each."""
    for memory in list(_maps):
        memory.madvise(mmap.MADV_DONTNEED)
