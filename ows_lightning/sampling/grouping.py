"""Draws by depth: every block is drawn as often as in independent draws, but together with blocks of similar depth.

The lowest active block decides the time of a step, since backward runs through all blocks above it. With pi the
inclusion probabilities of independent draws, a grouped draw takes ``count`` distinct blocks with exactly these
probabilities, but its lowest block lies higher on average.

The limit is a linear program over the lowest block m, drawn with the probability q_m, and the chance y_ml that m is the
lowest and l is drawn, too:

    maximise sum_m q_m m   subject to   q_l + sum_{m<l} y_ml = pi_l,   sum_{l>m} y_ml = (count - 1) q_m,   0 <= y_ml <= q_m.

Below the limit we take, of all distributions with the wanted mean of the lowest block, the one of maximum entropy (conditional
Poisson sampling, Hajek 1964, with a price on depth):

    P(S) proportional to exp(beta min S) prod_{l in S} w_l,

w fitted to pi and beta to the mean. Sums over all sets are elementary symmetric polynomials, in log space throughout.
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
        pi = inclusion_probabilities(probabilities, count)
        self._drawable = np.flatnonzero(pi)
        pi, depths = pi[self._drawable], self._drawable.astype(np.float64)
        independent = lowest_block_probabilities(probabilities, count)[self._drawable] @ depths
        self._highest = highest = _Highest(pi, count, depths)
        self._between, self._share = None, 1.0  # the share of draws that are the highest possible
        gain = highest.lowest @ depths - independent
        if grouping < 1 and gain > 1e-6:
            # Close to the limit w and beta grow without bound. Where they can't be fitted, draws of less grouping are mixed
            # with the highest ones, which keeps all probabilities, and the mean.
            for part in (grouping, 0.98 * grouping, 0.9 * grouping, 0.5 * grouping, 0.0):
                between = _MaximumEntropy(pi, count, depths, independent + part * gain)
                if between.fits:
                    self._between, self._share = between, (grouping - part) / (1 - part)
                    break
        self.inclusion, self.lowest = np.zeros(len(probabilities)), np.zeros(len(probabilities))
        for draws, share in ((highest, self._share), (self._between, 1 - self._share)):
            if draws is not None:
                self.inclusion[self._drawable] += share * draws.inclusion
                self.lowest[self._drawable] += share * draws.lowest

    def draw(self, generator: torch.Generator | None = None) -> list[int]:
        """Draws once; returns the blocks, ascending."""
        draws: _Highest | _MaximumEntropy = self._highest
        if self._between is not None and (self._share == 0 or _uniform(generator) >= self._share):
            draws = self._between
        return sorted(self._drawable[draws.draw(generator)].tolist())


@lru_cache(maxsize=8)
def grouped_draws(probabilities: tuple[float, ...], count: int, grouping: float) -> GroupedDraws:
    """Returns the ``GroupedDraws`` with these arguments, made once: fitting it takes up to a second, drawing no time."""
    return GroupedDraws(torch.tensor(probabilities, dtype=torch.float64), count, grouping)


class _Highest:
    """The draws whose lowest block lies highest: the linear program's m, and the others with its chances given m."""

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


class _MaximumEntropy:
    """The draws of maximum entropy with given inclusion probabilities and a given mean of the lowest block."""

    def __init__(self, pi: Floats, count: int, depths: Floats, depth: float) -> None:
        self._count, n = count, len(pi)
        target = np.append(pi, depth)
        x = np.append(np.log(pi) - np.log(np.maximum(1 - pi, 1e-12)), 0.0)  # log w, and beta
        # Newton's method on the log-likelihood, which is concave; a large beta is reached in small steps.
        sums, self.fits = _Sums(x, count, depths), False
        for _ in range(100):
            error = target - sums.mean
            self.fits = bool(np.abs(error).max() < 1e-9)
            if np.abs(error / np.append(pi, max(depth, 1.0))).max() < 1e-10:
                break
            scale = 1 / np.sqrt(np.maximum(np.diag(sums.covariance), 1e-300))
            flat = np.append(np.ones(n), 0.0) / scale  # scaling all w changes nothing
            flat /= np.linalg.norm(flat)
            curvature = sums.covariance * np.outer(scale, scale) + np.outer(flat, flat)
            step = scale * np.linalg.lstsq(curvature, scale * error, rcond=1e-14)[0]
            step *= min(1.0, 4.0 / np.abs(step).max())
            before = x @ target - sums.log_total
            while True:
                new = _Sums(x + step, count, depths)
                if (x + step) @ target - new.log_total >= before - 1e-12 * max(1.0, abs(before)) or np.abs(step).max() < 1e-9:
                    break
                step /= 2
            if np.abs(step).max() < 1e-9:
                break
            x, sums = x + step, new
        self._next = sums.next_chances()
        self.inclusion, self.lowest = sums.mean[:-1], sums.lowest

    def draw(self, generator: torch.Generator | None) -> list[int]:
        blocks = [_pick(self.lowest, generator)]
        chances = torch.rand(len(self.lowest), dtype=torch.float64, generator=generator).tolist()
        for block in range(blocks[0] + 1, len(self.lowest)):
            left = self._count - len(blocks)
            if left > 0 and chances[block] < self._next[block, left]:
                blocks.append(block)
        return blocks


class _Sums:
    """Sums over all sets of ``count`` blocks, each weighing exp(beta min S) prod w, with mean and covariance of the exponents.

    Args:
        x: Shape (n + 1,): log w of each block, and beta.
        count: Size of a set.
        depths: Shape (n,): what beta multiplies, for the set's lowest block.
    """

    def __init__(self, x: Floats, count: int, depths: Floats) -> None:
        n, (theta, beta) = len(depths), (x[:-1], x[-1])
        unit = np.eye(n + 1)
        # above[l][k]: log of the sum over all sets of k blocks from l on; below[l][k]: over those below l, priced.
        above, d_above = np.full((n + 1, count + 1), -np.inf), np.zeros((n + 1, count + 1, n + 1))
        below, d_below = np.full((n + 1, count + 1), -np.inf), np.zeros((n + 1, count + 1, n + 1))
        above[n, 0] = below[0, 0] = 0.0
        for block in reversed(range(n)):
            taken, d_taken = above[block + 1, :-1] + theta[block], d_above[block + 1, :-1] + unit[block]
            above[block, 0] = 0.0
            above[block, 1:], d_above[block, 1:] = _add(above[block + 1, 1:], d_above[block + 1, 1:], taken, d_taken)
        for block in range(n):
            taken, d_taken = below[block, :-1] + theta[block], d_below[block, :-1] + unit[block]
            taken[0] += beta * depths[block]
            d_taken[0] += depths[block] * unit[n]
            below[block + 1, 0] = 0.0
            below[block + 1, 1:], d_below[block + 1, 1:] = _add(below[block, 1:], d_below[block, 1:], taken, d_taken)
        self.log_total, d_total = below[n, count], d_below[n, count]
        # [l, k]: the chance that l is drawn with just k blocks below it, and its derivatives.
        chance = below[:-1, :-1] + theta[:, None] + above[1:, -2::-1] - self.log_total
        d_chance = d_below[:-1, :-1] + unit[:n, None] + d_above[1:, -2::-1] - d_total
        chance[:, 0] += beta * depths
        d_chance[:, 0] += depths[:, None] * unit[n]
        chance = np.exp(chance)
        self.lowest = chance[:, 0]
        self.mean = np.append(chance.sum(1), self.lowest @ depths)
        covariance = np.einsum("lk,lkj->lj", chance, d_chance)
        self.covariance = np.vstack([covariance, (self.lowest * depths) @ d_chance[:, 0]])
        self._theta, self._above = theta, above

    def next_chances(self) -> Floats:
        """[l, k]: the chance that block l is among the k >= 1 blocks that are drawn from it and those above it."""
        chances = np.zeros_like(self._above[:-1])
        possible = self._above[:-1, 1:]
        possible = np.where(np.isfinite(possible), possible, np.inf)  # more blocks than the model has
        chances[:, 1:] = np.exp(self._theta[:, None] + self._above[1:, :-1] - possible)
        return chances


def _add(a: Floats, d_a: Floats, b: Floats, d_b: Floats) -> tuple[Floats, Floats]:
    """log(exp a + exp b), and its derivatives."""
    total = np.logaddexp(a, b)
    finite = np.where(np.isfinite(total), total, 0.0)
    return total, np.exp(a - finite)[:, None] * d_a + np.exp(b - finite)[:, None] * d_b


def _uniform(generator: torch.Generator | None) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _pick(chances: Floats, generator: torch.Generator | None) -> int:
    ends = np.cumsum(chances)
    return int(np.searchsorted(ends, _uniform(generator) * ends[-1], side="right"))
