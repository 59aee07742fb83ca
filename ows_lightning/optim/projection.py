"""The update rule of projected AdamW: project, Adam, project back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ows_lightning.compat import foreach_add_, foreach_addcmul_, foreach_div_, foreach_mul, foreach_mul_, foreach_sqrt
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.optim.rounding import round_stochastically_
from ows_lightning.optim.subspace import Side


def project(gradient: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R = G Q (right) or R = P^T G (left): GaLore, arXiv 2403.03507, equation 5.

    Args:
        gradient: G, of shape (..., m, n).
        projector: Q, of shape (..., n, r), or P, of shape (..., m, r); of the gradient's dtype.
        side: Which of the two it is.

    Returns:
        R, of shape (..., m, r) or (..., r, n).
    """
    return gradient @ projector if side == "right" else projector.mT @ gradient


def project_factors(output_gradient: Tensor, inputs: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R = dY^T (X Q) (right) or R = (dY P)^T X (left): ``project`` of a linear layer's G = dY^T X, without G.

    It takes r (m + n) products a token instead of m n, and m n r more.

    Args:
        output_gradient: dY, of shape (tokens, m).
        inputs: X, of shape (tokens, n), of the same dtype.
        projector: Q, of shape (n, r), or P, of shape (m, r); of the same dtype.
        side: Which of the two it is.

    Returns:
        R, of shape (m, r) or (r, n).
    """
    if side == "right":
        return output_gradient.mT @ (inputs @ projector)
    return (output_gradient @ projector).mT @ inputs


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Updates both moments in place and returns Adam's direction for one (projected) gradient.

    Args:
        gradient: Gradient number ``step``, of any shape and floating dtype; its values stay.
        exp_avg: First moment, of the gradient's shape; float32 or wider, or bfloat16 with a generator.
        exp_avg_sq: Second moment, of the same shape and dtype.
        step: From 1; corrects the moments' bias.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        generator: Updates bfloat16 moments in float32 and rounds them stochastically; rounded to nearest, a second moment
            would never decay.

    Returns:
        The direction, of the gradient's shape, in the dtype in which the moments were updated.
    """
    if generator is None:
        return adam_directions([gradient], [exp_avg], [exp_avg_sq], [step], betas, eps)[0]
    exact = exp_avg.float(), exp_avg_sq.float()
    direction = adam_directions([gradient], [exact[0]], [exact[1]], [step], betas, eps)[0]
    round_stochastically_(exp_avg, exact[0], generator)
    round_stochastically_(exp_avg_sq, exact[1], generator)
    return direction


def adam_directions(
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Adam for many gradients at once, each at its own step; the same bits as one at a time.

    Args:
        gradients: Tensors of any shapes.
        exp_avgs: The first moment of each, updated in place.
        exp_avg_sqs: The second moment of each, updated in place.
        steps: The step's number for each, from 1.
        betas: Decay rates of the moments.
        eps: Added to the roots of the second moments.

    Returns:
        The directions, each of its gradient's shape, in the moments' dtype.
    """
    beta1, beta2 = betas
    gradients = [gradient.to(moment.dtype) for gradient, moment in zip(gradients, exp_avgs, strict=True)]
    foreach_mul_(exp_avgs, beta1)
    foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    foreach_mul_(exp_avg_sqs, beta2)
    foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)
    roots = foreach_sqrt(exp_avg_sqs)
    foreach_add_(roots, eps)
    directions = foreach_mul(exp_avgs, [math.sqrt(1 - beta2**step) / (1 - beta1**step) for step in steps])
    foreach_div_(directions, roots)
    return list(directions)


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

    Args:
        weight: W, of shape (m, n) or (b, m, n), changed in place.
        direction: D, of shape (..., m, r) for the right side, (..., r, n) for the left.
        projector: Q, of shape (..., n, r), or P, of shape (..., m, r).
        side: Which of the two it is.
        lr: Learning rate, with the scale of the updates.
        decay: Learning rate times weight decay.
        generator: The sum is formed in float32 and rounded stochastically to the weight's bfloat16; None rounds to nearest.
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
    """W <- (1 - decay) (W - lr D): AdamW in full rank, decay last as in galore-torch.

    Args:
        weight: W, of any shape, changed in place.
        direction: D, of the same shape.
        lr: Learning rate.
        decay: Learning rate times weight decay.
        generator: As in ``project_back_``.
    """
    if generator is None:
        descend_together_([weight], [direction], lr, decay)
        return
    exact = weight.float()
    descend_together_([exact], [direction], lr, decay)
    round_stochastically_(weight, exact, generator)


def descend_together_(weights: list[Tensor], directions: list[Tensor], lr: float, decay: float) -> None:
    """``descend_`` for many weights at once, without rounding; the same bits as one at a time.

    Args:
        weights: Tensors of any shapes, changed in place.
        directions: For each a tensor of the same shape.
        lr: Learning rate.
        decay: Learning rate times weight decay.
    """
    directions = [direction.to(weight.dtype) for weight, direction in zip(weights, directions, strict=True)]
    foreach_add_(weights, directions, alpha=-lr)
    foreach_mul_(weights, 1 - decay)
