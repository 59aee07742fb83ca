"""The update rule of projected AdamW: project, Adam, project back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ows_lightning.models.row_chunks import rows_at_a_time
from ows_lightning.optim.rounding import round_stochastically_
from ows_lightning.optim.subspace import Side


def project(gradient: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R = G Q (right) or R = P^T G (left): GaLore, arXiv 2403.03507, equation 5."""
    return gradient @ projector if side == "right" else projector.mT @ gradient


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Moves both moments on in place and returns Adam's direction for (projected) gradient number ``step``.

    Moments in bfloat16 move on in float32 and are rounded stochastically: to nearest, a second moment would never decay.
    """
    (beta1, beta2), kept = betas, (exp_avg, exp_avg_sq)
    exp_avg, exp_avg_sq = (moment.float() if generator is not None else moment for moment in kept)
    gradient = gradient.to(exp_avg.dtype)
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if generator is not None:
        round_stochastically_(kept[0], exp_avg, generator)
        round_stochastically_(kept[1], exp_avg_sq, generator)
    bias_correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return (exp_avg * bias_correction).div_(exp_avg_sq.sqrt().add_(eps))


def project_back_(
    weight: Tensor,
    direction: Tensor,
    projector: Tensor,
    side: Side,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """W <- (1 - decay) (W - lr D Q^T) for the right side, (1 - decay) (W - lr P D) for the left.

    With a generator, the sum is formed in float32 and rounded stochastically to the weight's bfloat16.
    """
    dtype = weight.dtype if generator is None else torch.float32
    direction, projector = direction.to(dtype), projector.to(dtype)
    tall, wide = (direction, projector.mT) if side == "right" else (projector, direction)
    # One fused product and sum: the update never exists as a matrix of the weight's size.
    if generator is None:
        accumulate = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
        accumulate(tall, wide, beta=1 - decay, alpha=-lr * (1 - decay))
        return
    rows = rows_at_a_time(weight.size(-1), weight.device)
    for part, of_tall in zip(weight.split(rows, dim=-2), tall.split(rows, dim=-2), strict=True):
        exact = part.float().mul_(1 - decay).sub_(of_tall @ wide, alpha=lr * (1 - decay))
        round_stochastically_(part, exact, generator)


def descend_(weight: Tensor, direction: Tensor, lr: float, decay: float, generator: torch.Generator | None) -> None:
    """W <- (1 - decay) (W - lr D): AdamW in full rank, decay last as in galore-torch."""
    exact = weight if generator is None else weight.float()
    exact.add_(direction.to(exact.dtype), alpha=-lr).mul_(1 - decay)
    if generator is not None:
        round_stochastically_(weight, exact, generator)
