"""Grouped draws: each block is drawn as often as in independent draws, but together with blocks of similar depth.

The lowest active block decides the time of a step, since backward runs through all blocks above it. With pi the inclusion
probabilities of independent draws, a grouped draw takes ``count`` distinct blocks with exactly these probabilities, but its
lowest block lies as high as possible on average.

That is a linear program over the probabilities q_m that block m is the lowest, and y_ml that l is drawn beside it:

    maximise sum_m q_m m   subject to   q_l + sum_{m<l} y_ml = pi_l,   sum_{l>m} y_ml = (count - 1) q_m,   0 <= y_ml <= q_m.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import hstack, identity, vstack

from ows_lightning.sampling.inclusion import inclusion_probabilities

_CERTAIN = 1 - 1e-9  # a block with at least this chance is always taken


class GroupedDraws:
    """Draws of ``count`` distinct blocks: m from the linear program, the others by their chances given m.

    ``lowest`` (num_layers,) has the chance of each block to be the lowest one, and ``others`` (num_layers, num_layers) that of
    each to be drawn above each lowest one. At least ``count`` of the ``probabilities``, of independent draws, are not 0.
    """

    def __init__(self, probabilities: tuple[float, ...], count: int) -> None:
        pi = inclusion_probabilities(probabilities, count)
        drawable, self._count = np.flatnonzero(pi), count
        n = len(drawable)
        m, other = np.triu_indices(n, k=1)
        block = identity(n, format="csr")
        # A column for each block m, of q, and behind them one for each pair, of y.
        drawn_in_all = hstack([block, block[other].T])
        drawn_beside = hstack([(1 - count) * block, block[m].T])
        at_most_q = hstack([-block[m], identity(len(m))])
        # A feasible point exists, but the solver may miss it where chances differ by many orders of magnitude.
        for tolerance in (1e-10, 1e-8, 1e-6):
            solution = linprog(
                np.append(-drawable.astype(np.float64), np.zeros(len(m))),
                A_ub=at_most_q if len(m) else None, b_ub=np.zeros(len(m)) if len(m) else None,
                A_eq=vstack([drawn_in_all, drawn_beside]), b_eq=np.append(pi[drawable], np.zeros(n)),
                bounds=(0, 1), options={"primal_feasibility_tolerance": tolerance},
            )  # fmt: skip
            if solution.success:
                break
        else:
            raise ArithmeticError(f"grouping: the draws with the highest lowest block can't be found ({solution.message})")
        self.lowest, self.others = np.zeros(len(pi)), np.zeros((len(pi), len(pi)))
        self.lowest[drawable] = np.maximum(solution.x[:n], 0)
        self.others[drawable[m], drawable[other]] = np.maximum(solution.x[n:], 0)

    def draw(self, generator: torch.Generator) -> list[int]:
        """Draws once; returns the blocks, ascending."""
        ends = np.cumsum(self.lowest)
        lowest = int(np.searchsorted(ends, random_uniform(generator) * ends[-1], side="right"))
        chances = self.others[lowest] / self.lowest[lowest]
        blocks = [lowest, *np.flatnonzero(chances >= _CERTAIN).tolist()]
        left = self._count - len(blocks)
        if left > 0:
            # Systematic sampling in a random order: as many as wanted, each with its own chance.
            rest = np.flatnonzero((chances < _CERTAIN) & (chances > 0))
            rest = rest[torch.randperm(len(rest), generator=generator, device="cpu").numpy()]
            ends = np.cumsum(chances[rest])
            points = (random_uniform(generator) + np.arange(left)) * (ends[-1] / left)
            blocks += rest[np.searchsorted(ends[:-1], points, side="right")].tolist()
        return sorted(blocks)


grouped_draws = lru_cache(maxsize=8)(GroupedDraws)  # made once: solving takes up to a second, drawing no time


def random_uniform(generator: torch.Generator) -> float:
    """Draws a number from 0 to 1."""
    return torch.rand((), dtype=torch.float64, generator=generator, device="cpu").item()
