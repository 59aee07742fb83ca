from __future__ import annotations

from itertools import permutations

import pytest
import torch

from ows_lightning.errors import UsageError
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.draws import draw_blocks, draw_window
from ows_lightning.sampling.inclusion import window_inclusion_probabilities
from tests.sampling.test_distributions import LLAMA_2_7B


def test_draw_is_ascending_distinct_and_repeatable() -> None:
    probabilities = sampling_probabilities(LLAMA_2_7B)
    draws = [draw_blocks(probabilities, 5, torch.Generator().manual_seed(seed)) for seed in (*range(20), *range(20))]
    assert all(draw == sorted(set(draw)) and len(draw) == 5 for draw in draws)
    assert draws[:20] == draws[20:]
    assert len({tuple(draw) for draw in draws}) > 10


def test_draw_all_and_only_blocks_that_can_be_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw_blocks(sampling_probabilities([1.0, 2.0, 3.0]), 3, generator) == [0, 1, 2]
    assert draw_blocks(sampling_probabilities([1.0, 0.0, 3.0]), 2, generator) == [0, 2]


def test_draws_are_successive_without_replacement() -> None:
    probabilities = sampling_probabilities([0.6, 0.25, 0.1, 0.05])
    p = probabilities.tolist()
    # First i, then j among those left: p_i * p_j / (1 - p_i); a pair can be drawn in two orders.
    expected = {
        (i, j): sum(p[a] * p[b] / (1 - p[a]) for a, b in permutations((i, j))) for i in range(4) for j in range(i + 1, 4)
    }
    assert sum(expected.values()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        counts[tuple(draw_blocks(probabilities, 2, generator))] += 1
    for pair, probability in expected.items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert counts[pair] / draws == pytest.approx(probability, abs=4 * deviation), pair


@pytest.mark.parametrize(
    ("ratios", "count", "message"),
    [
        ([1.0, 1.0], 3, r"^sampling\.activated_layers: 3 is more than the model's 2 blocks"),
        ([1.0, 0.0, 0.0], 2, r"^sampling\.activated_layers: 2 is more than the 1 of 3 blocks whose probability is not zero"),
    ],
)
def test_a_count_that_cannot_be_drawn_is_refused(ratios: list[float], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_blocks(sampling_probabilities(ratios), count, torch.Generator())


def test_a_window_is_drawn_by_its_sum_of_probabilities() -> None:
    probabilities = sampling_probabilities([0.0, 0.0, 3.0, 1.0, 2.0], "window")
    generator = torch.Generator().manual_seed(0)
    draws = [draw_window(probabilities, 2, generator) for _ in range(12_000)]
    assert all(high == low + 1 for low, high in draws)
    sums = {0: 0.0, 1: 3.0, 2: 4.0, 3: 3.0}
    for low, weight in sums.items():
        assert sum(draw[0] == low for draw in draws) / len(draws) == pytest.approx(weight / 10, abs=0.02)
    assert window_inclusion_probabilities(probabilities, 2).tolist() == pytest.approx([0.0, 0.3, 0.7, 0.7, 0.3])
    assert draw_window(probabilities, 5, generator) == [0, 1, 2, 3, 4]
    # Uniform windows of five of 32 blocks: 13.5 blocks lie below on average, and 5.87 - 0.11 * 13.5 = 4.4 operations remain.
    assert sum(draw_window(sampling_probabilities([1.0] * 32, "window"), 5, generator)[0] for _ in range(4000)) / 4000 == (
        pytest.approx(13.5, abs=0.6)
    )
