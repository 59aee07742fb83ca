"""The update rule of projected AdamW: project, Adam, project back."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Generator, Tensor

from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.optim.subspace import Side


@contextmanager
def without_autocast() -> Iterator[None]:
    """Lets products have their operands' dtypes, also where a loop of one's own backpropagates or steps within autocast."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def project(gradient: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R = G Q (right) or R = P^T G (left): GaLore, arXiv 2403.03507, equation 5.

    G has the shape (..., m, n), Q (..., n, r), P (..., m, r), R (..., m, r) or (..., r, n), all of one dtype.
    """
    return gradient @ projector if side == "right" else projector.mT @ gradient


def project_factors(output_gradient: Tensor, inputs: Tensor, projector: Tensor, side: Side) -> Tensor:
    """R = dY^T (X Q) (right) or R = (dY P)^T X (left): ``project`` of a linear layer's G = dY^T X, without G.

    It takes r (m + n) products a token instead of m n, and m n r more. dY has the shape (tokens, m), X (tokens, n).
    """
    if side == "right":
        return output_gradient.mT @ (inputs @ projector)
    return (output_gradient @ projector).mT @ inputs


def adam_(
    exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, step: int, betas: tuple[float, float], eps: float,
    generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R^2;  returns D = sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(V) + eps).

    Adam, arXiv 1412.6980; t is the ``step``, from 1. bfloat16 moments are updated in float32 and rounded stochastically.
    """
    (beta1, beta2), rounds = betas, exp_avg.dtype == torch.bfloat16
    m, v = (moment.float() if rounds else moment for moment in (exp_avg, exp_avg_sq))
    r = gradient.to(m.dtype)
    m.mul_(beta1).add_(r, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(r, r, value=1 - beta2)
    d = m.mul(math.sqrt(1 - beta2**step) / (1 - beta1**step)).div_(v.sqrt().add_(eps))
    if rounds:
        round_stochastically_(exp_avg, m, generator)
        round_stochastically_(exp_avg_sq, v, generator)
    return d


def projected_adamw_(
    weight: Tensor, gradient: Tensor, projector: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *,
    lr: float, betas: tuple[float, float], eps: float, side: Side | None = None, scale: float = 1.0, weight_decay: float = 0.0,
    generator: Generator | None = None, round_weights: bool = False,
) -> None:  # fmt: skip
    """One step of AdamW for a weight W (m x n), projected by its Q or in full rank; all is changed in place.

    With Adam's direction D of R, see ``adam_``::

        W <- (1 - lr decay) (W - lr scale D Q^T)       right;  W - lr scale P D left;  W - lr scale D in full rank

    R is the ``gradient`` (G in full rank), Q or P the ``projector`` (None: in full rank), M the ``exp_avg`` and V the
    ``exp_avg_sq``, of the shape of R, and t the ``step``, from 1. Decay acts after the step, as in galore-torch.

    bfloat16 moments need a generator: they are updated in float32 and rounded stochastically, since rounded to nearest a
    second moment would never decay. With ``round_weights``, a bfloat16 weight is rounded the same way.
    """
    shrink, noise = 1 - lr * weight_decay, generator if round_weights else None
    d = adam_(exp_avg, exp_avg_sq, gradient, step, betas, eps, generator)
    if projector is None:
        _add_(weight, d, shrink, -lr * scale, noise)
    else:
        left, right = (d, projector.mT) if side == "right" else (projector, d)
        _add_product_(weight, left, right, shrink, -lr * scale * shrink, noise)


def _add_(weight: Tensor, direction: Tensor, shrink: float, alpha: float, generator: Generator | None) -> None:
    """W <- shrink (W + alpha D); with a generator, formed in float32 and rounded stochastically to the weight's bfloat16."""
    w = weight if generator is None else weight.float()
    w.add_(direction.to(w.dtype), alpha=alpha).mul_(shrink)
    if generator is not None:
        round_stochastically_(weight, w, generator)


def _add_product_(weight: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, generator: Generator | None) -> None:
    """W <- beta W + alpha L R; with a generator, formed in float32 and rounded stochastically to the weight's bfloat16."""
    dtype = weight.dtype if generator is None else torch.float32
    left, right = left.to(dtype), right.to(dtype)
    # One fused product and sum: the update never exists as a matrix of the weight's size.
    if generator is None:
        (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(left, right, beta=beta, alpha=alpha)
        return
    rows = rows_at_a_time(weight[..., :1, :].numel(), weight.device)
    for part, of_left in zip(weight.split(rows, dim=-2), left.split(rows, dim=-2), strict=True):
        round_stochastically_(part, part.float().mul_(beta).add_(of_left @ right, alpha=alpha), generator)


def merge_update_(weight: Tensor, update: Tensor, projector: Tensor, generator: Generator | None = None) -> None:
    """W <- W + B Q^T in place, for W (..., m, n), B (..., m, r), Q (..., n, r); rounded stochastically with a generator."""
    _add_product_(weight, update.to(weight.device), projector.to(weight.device).mT, 1.0, 1.0, generator)


def round_stochastically_(target: Tensor, value: Tensor, generator: Generator | None) -> None:
    """Writes float32 ``value`` into bfloat16 ``target``, rounded up or down at random so that E[target] = value.

    Small updates survive on average instead of being rounded away. Both have the same shape, whatever it is; the generator is
    on their device. Source: Zamirai et al., "Revisiting BFloat16 Training" (arXiv 2010.06192).
    """
    # bfloat16 is float32 without its last 16 bits: noise below the cut carries over with just the right probability.
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    target.copy_((value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32))
