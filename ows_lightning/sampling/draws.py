"""Drawing distinct blocks, and how often each of them is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ows_lightning.errors import UsageError


def draw_blocks(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws distinct blocks, one after the other, each in proportion to the probabilities of those still left.

    Args:
        probabilities: Shape (num_layers,), see `sampling_probabilities`.
        count: How many blocks to draw (gamma in the paper).
        generator: The CPU random generator to draw with; None is torch's global one.

    Returns:
        The indices of the blocks, ascending.

    Raises:
        UsageError: `count` is below 1 or above the number of blocks that can be drawn.
    """
    num_layers, drawable = len(probabilities), int((probabilities > 0).sum())
    if count < 1:
        raise UsageError(f"activated_layers: {count} blocks leave nothing to train; give at least 1")
    if count > num_layers:
        raise UsageError(f"activated_layers: {count} is more than the model's {num_layers} blocks; give at most that")
    if count > drawable:
        raise UsageError(
            f"activated_layers: {count} is more than the {drawable} of {num_layers} blocks whose probability is not "
            f"zero; give at most {drawable}, or another `distribution` or a lower `threshold`"
        )
    return sorted(torch.multinomial(probabilities, count, replacement=False, generator=generator).tolist())


def inclusion_probabilities(probabilities: Sequence[float], draws: int) -> np.ndarray:
    r"""Chance of each block to be among ``draws`` successive draws without replacement.

    Successive sampling is a race of exponential clocks with the probabilities as rates, of which the first ``draws``
    to ring win. So block :math:`l` is drawn with the probability

    .. math:: \pi_l = \int_0^\infty p_l e^{-p_l t} P(\text{fewer than draws of the others have rung by } t) dt,

    exact but for the quadrature (about 1e-9).

    Args:
        probabilities: Probability of each block, shape ``(num_layers,)``, sums to 1.
        draws: Number of distinct blocks drawn.

    Returns:
        float64, shape ``(num_layers,)``, sums to ``draws``.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    possible = p > 0
    if draws >= possible.sum():
        return possible.astype(np.float64)
    p = p[possible] / p.sum()
    # On a logarithmic grid the integrand is smooth and vanishes at both ends, where equal steps converge fastest.
    log_t = np.linspace(np.log(1e-12), np.log(50 / p.min()), 800)
    clock = np.outer(p, np.exp(log_t))
    rung = -np.expm1(-clock)
    others = np.zeros((draws, *rung.shape))  # [k, l, t]: chance that exactly k blocks other than l have rung by t
    others[0] = 1
    for block, chance in enumerate(rung):
        q = np.tile(chance, (len(p), 1))
        q[block] = 0
        others[1:] = others[1:] * (1 - q) + others[:-1] * q
        others[0] *= 1 - q
    included = np.zeros(len(possible))
    included[possible] = (clock * np.exp(-clock) * others.sum(0)).sum(1) * (log_t[1] - log_t[0])
    return included
