"""Inclusion probabilities: how likely each block is drawn.

Successive draws without replacement are a race of exponential clocks with the probabilities as rates, of which the first
``count`` to ring win. Sums over all orders of drawing become integrals over the time of one clock.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def inclusion_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    r"""Probability of each block to be among ``count`` successive draws without replacement.

    .. math:: \pi_l = \int_0^\infty p_l e^{-p_l t} P(\text{fewer than count of the others have rung by } t) dt,

    exact up to the error of the quadrature (about 1e-9): float64, (num_layers,), sums to ``count``.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    possible = p > 0
    if count >= possible.sum():
        return possible.astype(np.float64)
    p = p[possible] / p.sum()
    log_t = np.linspace(np.log(1e-12), np.log(50 / p.min()), 800)  # smooth, and 0 at both ends: equal steps converge fastest
    clock = np.outer(p, np.exp(log_t))
    rung = -np.expm1(-clock)
    others = np.zeros((count, *rung.shape))  # [k, l, t]: probability that exactly k blocks other than l have rung by t
    others[0] = 1
    for block, has_rung in enumerate(rung):
        q = np.tile(has_rung, (len(p), 1))
        q[block] = 0
        others[1:] = others[1:] * (1 - q) + others[:-1] * q
        others[0] *= 1 - q
    pi = np.minimum((clock * np.exp(-clock) * others.sum(0)).sum(1) * (log_t[1] - log_t[0]), 1.0)
    room = pi * (1 - pi)
    pi += (count - pi.sum()) * room / max(room.sum(), 1e-300)  # the error of the quadrature
    included = np.zeros(len(possible))
    included[possible] = np.minimum(pi, 1.0)
    return included


def window_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    """Probability of each block (num_layers - count + 1) to be a window's lowest: the window's sum, normalised."""
    sums = np.convolve(np.asarray(probabilities, dtype=np.float64), np.ones(count), mode="valid")
    return sums / sums.sum()


def window_inclusion_probabilities(probabilities: Sequence[float] | Tensor, count: int) -> Floats:
    """Probability of each block to be in the drawn window; arguments and sum as of ``inclusion_probabilities``."""
    return np.convolve(window_probabilities(probabilities, count), np.ones(count))
