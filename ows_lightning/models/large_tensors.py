"""Work on large tensors without large temporaries."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_at_a_time(elements: int, device: torch.device) -> int:
    """Returns how many rows of so many elements to work on at a time.

    Their float32 copies take 4 MB on a CPU, whose cache holds them, and 16 MB on a GPU, which wants fewer and larger kernels.
    """
    return max(1, (1 << (22 if device.type == "cuda" else 20)) // elements)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; `isfinite` would need memory for a copy of it, and this needs none."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
