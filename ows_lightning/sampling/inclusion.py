"""Chances in independent draws: of each block to be drawn, and to be the lowest one.

Successive draws without replacement are a race of exponential clocks with the probabilities as rates, of which the first
``count`` to ring win. Sums over all orders of drawing become integrals over the time of one clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def inclusion_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    r"""Chance of each block to be among ``count`` successive draws without replacement.

    .. math:: \pi_l = \int_0^\infty p_l e^{-p_l t} P(\text{fewer than count of the others have rung by } t) dt,

    exact up to the error of the quadrature (about 1e-9).

    Args:
        probabilities: Probability of each block, shape ``(num_layers,)``.
        count: Number of distinct blocks drawn.

    Returns:
        float64, shape ``(num_layers,)``, sums to ``count``.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    possible = p > 0
    if count >= possible.sum():
        return possible.astype(np.float64)
    p = p[possible] / p.sum()
    log_t = _log_times(p)
    clock = np.outer(p, np.exp(log_t))
    rung = -np.expm1(-clock)
    others = np.zeros((count, *rung.shape))  # [k, l, t]: chance that exactly k blocks other than l have rung by t
    others[0] = 1
    for block, chance in enumerate(rung):
        q = np.tile(chance, (len(p), 1))
        q[block] = 0
        others[1:] = others[1:] * (1 - q) + others[:-1] * q
        others[0] *= 1 - q
    pi = np.minimum((clock * np.exp(-clock) * others.sum(0)).sum(1) * (log_t[1] - log_t[0]), 1.0)
    room = pi * (1 - pi)
    pi += (count - pi.sum()) * room / max(room.sum(), 1e-300)  # the error of the quadrature
    included = np.zeros(len(possible))
    included[possible] = np.minimum(pi, 1.0)
    return included


def lowest_block_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    r"""Chance of each block to be the lowest of ``count`` successive draws without replacement.

    With c the sum of the probabilities up to block j, no block up to j is drawn with the chance

    .. math:: P(\min > j) = \int_0^\infty c e^{-ct} P(\text{at least count of the others have rung by } t) dt.

    Args:
        probabilities: Probability of each block, shape ``(num_layers,)``.
        count: Number of distinct blocks drawn, at most the number of those whose probability is not zero.

    Returns:
        float64, shape ``(num_layers,)``, sums to 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    p = p / p.sum()
    log_t = _log_times(p[p > 0])
    times = np.exp(log_t)
    fewer = np.zeros((count, len(times)))  # [k, t]: chance that exactly k of the blocks above j have rung by t
    fewer[0] = 1
    above = np.ones(len(p) + 1)  # [j + 1]: chance that the lowest lies above j
    for j in range(len(p) - 1, -1, -1):
        if (rate := p[: j + 1].sum()) > 0:
            clock = rate * times
            above[j + 1] = (clock * np.exp(-clock) * (1 - fewer.sum(0))).sum() * (log_t[1] - log_t[0])
        rung = -np.expm1(-p[j] * times)
        fewer[1:] = fewer[1:] * (1 - rung) + fewer[:-1] * rung
        fewer[0] *= 1 - rung
    return np.maximum(-np.diff(above), 0.0)


def window_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    """Chance of each block to be the lowest of a window of ``count`` neighbours, drawn by the sum of their probabilities.

    Args:
        probabilities: Probability of each block, shape ``(num_layers,)``.
        count: Number of blocks in a window.

    Returns:
        float64, shape ``(num_layers - count + 1,)``, sums to 1.
    """
    sums = np.convolve(np.asarray(probabilities, dtype=np.float64), np.ones(count), mode="valid")
    return sums / sums.sum()


def window_inclusion(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    """Chance of each block to be in the window that is drawn; arguments and sum as of ``inclusion_probabilities``."""
    return np.convolve(window_probabilities(probabilities, count), np.ones(count))


def _log_times(p: Floats) -> Floats:
    """A logarithmic grid, on which the integrands are smooth and vanish at both ends: equal steps converge fastest."""
    return np.linspace(np.log(1e-12), np.log(50 / p.min()), 800)
