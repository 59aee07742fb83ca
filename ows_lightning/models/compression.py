"""A tensor as the compressed difference from another one of its dtype and shape, without loss.

A trained weight differs little from what it was: of its bits, read as an integer, the upper ones hardly change. So the
integers are subtracted, their signs put last (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), bytes of the same place put
together, and compressed.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress(tensor: Tensor, base: Tensor) -> Tensor:
    """Returns the compressed difference of a tensor, of any dtype and shape, from its base, as uint8 of shape ``(bytes,)``."""
    difference = _integers(tensor) - _integers(base)
    bits = 8 * difference.itemsize
    unsigned = (difference << 1) ^ (difference >> (bits - 1))
    planes: Any = np.ascontiguousarray(unsigned.view(np.uint8).reshape(-1, difference.itemsize).T)
    return torch.frombuffer(bytearray(zlib.compress(planes, 1)), dtype=torch.uint8)


def decompress(compressed: Tensor, base: Tensor) -> Tensor:
    """Returns the tensor that `compress` was given, to the bit; a zlib.error or ValueError if the bytes are damaged."""
    before = _integers(base)
    planes: Any = np.frombuffer(zlib.decompress(compressed.numpy().data), np.uint8).reshape(before.itemsize, before.size)
    unsigned: Any = np.ascontiguousarray(planes.T).view(f"u{before.itemsize}").reshape(-1)
    difference = (unsigned >> 1) ^ (~(unsigned & 1) + 1)
    return torch.from_numpy(before + difference.view(before.dtype)).view(base.dtype).view(base.shape)


def _integers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()]).numpy()
