"""Whether weights are numbers."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; `isfinite` would need memory for a copy of it, and this needs none."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
