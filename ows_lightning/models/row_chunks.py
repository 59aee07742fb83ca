"""How much of a large tensor is worked on at a time, so that temporaries in float32 stay small."""

from __future__ import annotations

import torch


def rows_at_a_time(elements: int, device: torch.device) -> int:
    """Returns how many rows of so many elements to work on at a time.

    Their float32 copies take 4 MB on a CPU, whose cache holds them, and 16 MB on a GPU, which wants fewer and larger kernels.
    """
    return max(1, (1 << (22 if device.type == "cuda" else 20)) // elements)
