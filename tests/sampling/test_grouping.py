"""Grouped draws: who is drawn how often stays, who is drawn with whom changes."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ows_lightning.errors import UsageError
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import Distribution, sampling_probabilities
from ows_lightning.sampling.draws import draw_blocks
from ows_lightning.sampling.grouping import GroupedDraws
from ows_lightning.sampling.inclusion import inclusion_probabilities
from tests.published import LLAMA_2_7B

SKEWED = [0.0, 900.0, 1e-4, 0.3, 0.0, 2e-7, 5.0, 0.3, 40.0, 0.0]


def grouped(probabilities: Tensor, count: int) -> GroupedDraws:
    return GroupedDraws(tuple(probabilities.tolist()), count)


def mean_lowest(probabilities: Tensor, count: int) -> float:
    return float(grouped(probabilities, count).lowest @ np.arange(len(probabilities)))


@pytest.mark.parametrize("distribution", [*get_args(Distribution), SKEWED])
def test_every_block_is_drawn_as_often_as_independently(distribution: str | list) -> None:
    probabilities = sampling_probabilities([5.0, 900.0, 1e-4, 0.3, 1.0, 2e-7, 5.0, 0.3, 40.0, 0.0], distribution)
    for count in range(1, int((probabilities > 0).sum()) + 1):
        draws = grouped(probabilities, count)
        expected = inclusion_probabilities(probabilities, count)
        np.testing.assert_allclose(draws.lowest + draws.others.sum(0), expected, atol=1e-8)
        assert draws.lowest.sum() == pytest.approx(1)
        generator = torch.Generator().manual_seed(count)
        for grouping in [0.01, 0.5, 0.99, 1.0] * 5:
            blocks = draw_blocks(probabilities, count, generator, grouping)
            assert len(set(blocks)) == count
            assert blocks == sorted(blocks)
            assert all(probabilities[block] > 0 for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", [0.6, 1.0])
def test_many_draws_have_the_probabilities_that_are_said(grouping: float) -> None:
    probabilities, count, draws = sampling_probabilities([3.0, 8.0, 0.0, 1.0, 2.0, 0.2, 4.0]), 3, 30_000
    generator = torch.Generator().manual_seed(0)
    drawn, lowest = np.zeros(7), np.zeros(7)
    for _ in range(draws):
        blocks = draw_blocks(probabilities, count, generator, grouping)
        drawn[blocks] += 1
        lowest[blocks[0]] += 1
    for counts, chances in (
        (drawn, inclusion_probabilities(probabilities, count)),
        (lowest, grouped(probabilities, count).lowest),
    ):
        if grouping == 1 or counts is drawn:
            deviation = np.sqrt(chances * (1 - chances) / draws)
            assert (np.abs(counts / draws - chances) <= 4.5 * deviation + 1e-9).all()


def test_blocks_beside_a_lowest_one_are_not_always_the_same_pairs() -> None:
    draws = grouped(sampling_probabilities([1.0] * 5), 3)
    draws.lowest, draws.others = np.eye(5)[0], np.zeros((5, 5))
    draws.others[0, 1:] = 0.5  # two of four: in a fixed order 1 would be drawn with 3 alone, and 2 with 4
    generator = torch.Generator().manual_seed(0)
    assert {tuple(draws.draw(generator)) for _ in range(200)} == {(0, *pair) for pair in combinations(range(1, 5), 2)}


def test_no_draws_with_the_same_probabilities_have_a_higher_lowest_block() -> None:
    from scipy.optimize import linprog

    probabilities = sampling_probabilities([3.0, 8.0, 1.0, 2.0, 0.2, 4.0])
    for count in (1, 2, 3, 5):
        sets = list(combinations(range(6), count))  # the program over all sets, whose size no model allows
        contains = [[float(block in chosen) for chosen in sets] for block in range(6)]
        best = linprog([-min(chosen) for chosen in sets], A_eq=contains, b_eq=inclusion_probabilities(probabilities, count))
        assert mean_lowest(probabilities, count) == pytest.approx(-best.fun, abs=1e-7)


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
    independent = torch.multinomial(probabilities.expand(100_000, -1), count, generator=torch.Generator().manual_seed(0))
    for lowest, expected in (
        (float(independent.amin(1).double().mean()), at_0),
        (mean_lowest(probabilities, count), at_1),
    ):
        assert 5.87 - (5.87 - 2.89) / 27 * lowest == pytest.approx(expected, abs=0.015)


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
    draws = grouped(probabilities, 8)
    np.testing.assert_allclose(draws.lowest + draws.others.sum(0), inclusion_probabilities(probabilities, 8), atol=1e-8)
