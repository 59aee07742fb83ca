"""Grouped draws: who is drawn how often stays, who is drawn with whom changes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from ows_lightning.errors import UsageError
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import DISTRIBUTIONS, sampling_probabilities
from ows_lightning.sampling.draws import draw_blocks
from ows_lightning.sampling.grouping import GroupedDraws
from ows_lightning.sampling.inclusion import inclusion_probabilities, lowest_block_probabilities
from tests.published import LLAMA_2_7B

SKEWED = [0.0, 900.0, 1e-4, 0.3, 0.0, 2e-7, 5.0, 0.3, 40.0, 0.0]


def mean_lowest(probabilities: torch.Tensor, count: int, grouping: float) -> float:
    if grouping == 0:
        lowest = lowest_block_probabilities(probabilities, count)
    else:
        lowest = GroupedDraws(probabilities, count, grouping).lowest
    return float(lowest @ np.arange(len(probabilities)))


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, SKEWED])
@pytest.mark.parametrize("grouping", [0.01, 0.5, 0.99, 1.0])
def test_every_block_is_drawn_as_often_as_independently(distribution: str | list, grouping: float) -> None:
    probabilities = sampling_probabilities([5.0, 900.0, 1e-4, 0.3, 1.0, 2e-7, 5.0, 0.3, 40.0, 0.0], distribution)
    for count in range(1, int((probabilities > 0).sum()) + 1):
        draws = GroupedDraws(probabilities, count, grouping)
        expected = inclusion_probabilities(probabilities, count)
        np.testing.assert_allclose(draws.inclusion, expected, atol=1e-8)
        assert draws.inclusion.sum() == pytest.approx(count)
        assert draws.lowest.sum() == pytest.approx(1)
        generator = torch.Generator().manual_seed(count)
        for _ in range(20):
            blocks = draws.draw(generator)
            assert len(set(blocks)) == count
            assert blocks == sorted(blocks)
            assert all(probabilities[block] > 0 for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", [0.6, 1.0])
def test_a_hundred_thousand_draws_have_the_probabilities_that_are_said(grouping: float) -> None:
    probabilities, count, draws = sampling_probabilities([3.0, 8.0, 0.0, 1.0, 2.0, 0.2, 4.0]), 3, 100_000
    grouped = GroupedDraws(probabilities, count, grouping)
    generator = torch.Generator().manual_seed(0)
    drawn, lowest = np.zeros(7), np.zeros(7)
    for _ in range(draws):
        blocks = grouped.draw(generator)
        drawn[blocks] += 1
        lowest[blocks[0]] += 1
    expected = inclusion_probabilities(probabilities, count)
    for counts, chances in ((drawn, expected), (lowest, grouped.lowest)):
        deviation = np.sqrt(chances * (1 - chances) / draws)
        assert (np.abs(counts / draws - chances) <= 4.5 * deviation + 1e-9).all()


@pytest.mark.parametrize("distribution", ["outlier", "uniform", "increasing"])
@pytest.mark.parametrize("count", [2, 5])
def test_the_lowest_block_rises_evenly_with_grouping(distribution: str, count: int) -> None:
    probabilities = sampling_probabilities(LLAMA_2_7B, distribution)
    shares = [0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0]
    depths = [mean_lowest(probabilities, count, share) for share in shares]
    assert depths == sorted(depths)
    gain = depths[-1] - depths[0]
    assert gain > 1
    np.testing.assert_allclose(depths, [depths[0] + share * gain for share in shares], atol=1e-6)


def test_no_draws_with_the_same_probabilities_have_a_higher_lowest_block() -> None:
    from scipy.optimize import linprog

    probabilities = sampling_probabilities([3.0, 8.0, 1.0, 2.0, 0.2, 4.0])
    for count in (1, 2, 3, 5):
        sets = list(combinations(range(6), count))  # the program over all sets, whose size no model allows
        contains = [[float(block in chosen) for chosen in sets] for block in range(6)]
        best = linprog([-min(chosen) for chosen in sets], A_eq=contains, b_eq=inclusion_probabilities(probabilities, count))
        assert mean_lowest(probabilities, count, 1.0) == pytest.approx(-best.fun, abs=1e-7)


def test_between_a_draw_is_the_limit_with_the_chance_of_the_grouping_else_an_independent_one() -> None:
    probabilities = sampling_probabilities(LLAMA_2_7B)
    for seed in range(30):
        uniform = float(torch.rand((), dtype=torch.float64, generator=(generator := torch.Generator().manual_seed(seed))))
        state = generator.get_state()
        grouping = 1.0 if uniform < 0.4 else 0.0
        expected = draw_blocks(probabilities, 5, generator, grouping)
        assert draw_blocks(probabilities, 5, torch.Generator().manual_seed(seed), 0.4) == expected
        assert not torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("distribution", "count", "at_0", "at_1"),
    [
        ("outlier", 5, 5.76, 5.09),
        ("uniform", 5, 5.38, 4.40),
        ("decreasing", 5, 5.62, 4.93),
        ("outlier", 2, 5.40, 4.89),
        ("uniform", 2, 4.76, 4.22),
        ("outlier", 8, 5.83, 5.35),
        ("uniform", 8, 5.58, 4.55),
    ],
)
def test_operations_of_llama_2_7b(distribution: str, count: int, at_0: float, at_1: float) -> None:
    # Per token and weight: counted 5.87 where the lowest active block is 0, and 2.89 where it is 27; in between a line.
    probabilities = sampling_probabilities(LLAMA_2_7B, distribution)
    for grouping, expected in ((0.0, at_0), (1.0, at_1)):
        operations = 5.87 - (5.87 - 2.89) / 27 * mean_lowest(probabilities, count, grouping)
        assert operations == pytest.approx(expected, abs=0.015)


def test_a_draw_follows_from_seed_and_interval_alone() -> None:
    def sampler(seed: int) -> LayerwiseSampling:
        sampling = LayerwiseSampling(activated_layers=5, seed=seed, grouping=0.7)
        sampling.probabilities = sampling_probabilities(LLAMA_2_7B)
        return sampling

    forwards = [sampler(0).blocks_of(interval) for interval in range(8)]
    one = sampler(0)
    assert [one.blocks_of(interval) for interval in reversed(range(8))] == forwards[::-1]
    assert [sampler(1).blocks_of(interval) for interval in range(8)] != forwards


def test_without_grouping_draws_are_independent() -> None:
    probabilities = sampling_probabilities(LLAMA_2_7B)
    plain = draw_blocks(probabilities, 5, torch.Generator().manual_seed(3))
    assert draw_blocks(probabilities, 5, torch.Generator().manual_seed(3), grouping=0.0) == plain


@pytest.mark.parametrize("grouping", [-0.1, 1.5, float("nan")])
def test_a_grouping_out_of_range_is_refused(grouping: float) -> None:
    with pytest.raises(UsageError, match=r"^sampling\.grouping: .* is not between 0 \(independent draws\) and 1"):
        LayerwiseSampling(grouping=grouping)


def test_many_blocks_of_most_different_chances() -> None:
    scores = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(4).exp()
    probabilities = sampling_probabilities(scores)
    for grouping in (0.2, 0.999):
        draws = GroupedDraws(probabilities, 8, grouping)
        np.testing.assert_allclose(draws.inclusion, inclusion_probabilities(probabilities, 8), atol=1e-8)
