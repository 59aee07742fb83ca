"""Stochastic rounding to bfloat16: small updates survive on average instead of being rounded away."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically_(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Writes float32 ``value`` into bfloat16 ``target``, rounded up or down at random so that E[target] = value.

    Both have the same shape, whatever it is; the generator is on their device.

    Source: Zamirai et al., "Revisiting BFloat16 Training" (arXiv 2010.06192).
    """
    # bfloat16 is float32 without its last 16 bits: noise below the cut carries over with just the right probability.
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    target.copy_((value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32))
