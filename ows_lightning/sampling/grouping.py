"""Grouped draws: each block is drawn as often as in independent draws, but together with blocks of similar depth.

The lowest active block decides the time of a step, since backward runs through all blocks above it. With pi the
inclusion probabilities of independent draws, a grouped draw takes ``count`` distinct blocks with exactly these
probabilities, but its lowest block lies higher on average.

The limit is a linear program over the lowest block m, drawn with the probability q_m, and the chance y_ml that m is the
lowest and l is drawn, too:

    maximise sum_m q_m m   subject to   q_l + sum_{m<l} y_ml = pi_l,   sum_{l>m} y_ml = (count - 1) q_m,   0 <= y_ml <= q_m.

With a grouping below 1, this limit is drawn with that probability, else independently: the inclusion probabilities stay, and
the mean of the lowest block lies as far between the two.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ows_lightning.sampling.inclusion import inclusion_probabilities, lowest_block_probabilities

Floats = NDArray[np.float64]
_SURE = 1 - 1e-9  # a block with at least this chance is always taken


class GroupedDraws:
    """Draws of distinct blocks whose lowest one lies higher than in independent draws.

    Args:
        probabilities: Shape (num_layers,), those of independent draws; some may be zero.
        count: How many blocks to draw, at most the number of those whose probability is not zero.
        grouping: Share of the possible gain, above 0 and up to 1.

    Attributes:
        inclusion: Shape (num_layers,), float64: the chance of each block to be drawn, as in independent draws.
        lowest: Shape (num_layers,), float64: the chance of each block to be the lowest one.
    """

    def __init__(self, probabilities: Tensor, count: int, grouping: float) -> None:
        self._probabilities, self._count, self._grouping = probabilities, count, grouping
        pi = inclusion_probabilities(probabilities, count)
        self._drawable = np.flatnonzero(pi)
        self._highest = _Highest(pi[self._drawable], count, self._drawable.astype(np.float64))
        self.inclusion, self.lowest = (1 - grouping) * pi, (1 - grouping) * lowest_block_probabilities(probabilities, count)
        self.inclusion[self._drawable] += grouping * self._highest.inclusion
        self.lowest[self._drawable] += grouping * self._highest.lowest

    def draw(self, generator: torch.Generator | None = None) -> list[int]:
        """Draws once; returns the blocks, ascending."""
        if self._grouping < 1 and _uniform(generator) >= self._grouping:
            return independent_draw(self._probabilities, self._count, generator)
        return sorted(self._drawable[self._highest.draw(generator)].tolist())


def independent_draw(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws distinct blocks, one after the other, in proportion to the probabilities of those left; returns them ascending."""
    return sorted(torch.multinomial(probabilities, count, replacement=False, generator=generator).tolist())


@lru_cache(maxsize=8)
def grouped_draws(probabilities: tuple[float, ...], count: int, grouping: float) -> GroupedDraws:
    """Returns the ``GroupedDraws`` with these arguments, made once: solving takes up to a second, drawing no time."""
    return GroupedDraws(torch.tensor(probabilities, dtype=torch.float64), count, grouping)


class _Highest:
    """The draws with the highest mean of the lowest block: m from the linear program, the others by their chances given m."""

    def __init__(self, pi: Floats, count: int, depths: Floats) -> None:
        from scipy.optimize import linprog  # imported here: independent draws don't need scipy
        from scipy.sparse import coo_array, vstack

        n, self._count = len(pi), count
        m, other = np.triu_indices(n, k=1)
        pairs = np.arange(n, n + len(m))  # the columns of y behind the n of q
        of_other = coo_array((np.ones(n + len(m)), (np.append(np.arange(n), other), np.arange(n + len(m)))))
        sizes = coo_array(
            (np.append(np.full(n, 1.0 - count), np.ones(len(m))), (np.append(np.arange(n), m), np.arange(n + len(m))))
        )
        at_most_q = coo_array(
            (np.append(np.ones(len(m)), -np.ones(len(m))), (np.tile(np.arange(len(m)), 2), np.append(pairs, m))),
            shape=(len(m), n + len(m)),
        )
        # A feasible point exists, but the solver may miss it where chances differ by many orders of magnitude.
        for tolerance in (1e-10, 1e-8, 1e-6):
            found = linprog(
                np.append(-depths, np.zeros(len(m))),
                A_ub=at_most_q if len(m) else None,
                b_ub=np.zeros(len(m)) if len(m) else None,
                A_eq=vstack([of_other, sizes]),
                b_eq=np.append(pi, np.zeros(n)),
                bounds=(0, 1),
                options={"primal_feasibility_tolerance": tolerance},
            )
            if found.success:
                break
        else:
            raise ArithmeticError(f"grouping: the draws with the highest lowest block can't be found ({found.message})")
        self.lowest = np.maximum(found.x[:n], 0)
        self._others = np.zeros((n, n))
        self._others[m, other] = np.maximum(found.x[n:], 0)
        self.inclusion = self.lowest + self._others.sum(0)

    def draw(self, generator: torch.Generator | None) -> list[int]:
        lowest = _pick(self.lowest, generator)
        chances = self._others[lowest] / self.lowest[lowest]
        blocks = [lowest, *np.flatnonzero(chances >= _SURE).tolist()]
        left = self._count - len(blocks)
        if left > 0:
            # Systematic sampling in a random order: as many as wanted, each with its own chance.
            rest = np.flatnonzero((chances < _SURE) & (chances > 0))
            rest = rest[torch.randperm(len(rest), generator=generator).numpy()]
            ends = np.cumsum(chances[rest])
            points = (_uniform(generator) + np.arange(left)) * (ends[-1] / left)
            blocks += rest[np.searchsorted(ends[:-1], points, side="right")].tolist()
        return blocks


def _uniform(generator: torch.Generator | None) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _pick(chances: Floats, generator: torch.Generator | None) -> int:
    ends = np.cumsum(chances)
    return int(np.searchsorted(ends, _uniform(generator) * ends[-1], side="right"))
