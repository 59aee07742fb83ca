from __future__ import annotations

from itertools import permutations

import pytest
import torch

from ows_lightning.errors import UsageError
from ows_lightning.sampling.distributions import DISTRIBUTIONS, draw_blocks, sampling_probabilities

# Outlier ratios of Llama-2-7B in percent, block 0 first, as published with the paper's code.
LLAMA_2_7B = [
    *(0.2678, 0.2953, 0.1274, 0.1145, 0.0988, 0.0884, 0.0878, 0.0838, 0.0801, 0.0722, 0.0707, 0.0696, 0.0630, 0.0591),
    *(0.0552, 0.0537, 0.0468, 0.0392, 0.0336, 0.0340, 0.0316, 0.0279, 0.0278, 0.0229, 0.0254, 0.0209, 0.0242, 0.0182),
    *(0.0184, 0.0209, 0.0241, 0.0825),
]


def test_published_ratios_of_llama_2_7b() -> None:
    probabilities = sampling_probabilities(torch.tensor(LLAMA_2_7B))
    assert probabilities.shape == (32,)
    published = {0: 0.123, 1: 0.135, 27: 0.008, 31: 0.038}
    assert {block: round(probabilities[block].item(), 3) for block in published} == published


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, [1, 0, 2.5, 4]])
def test_is_a_distribution_in_float64(distribution: str | list[float]) -> None:
    probabilities = sampling_probabilities([0.3, 0.1, 0.2, 0.0], distribution)
    assert probabilities.dtype == torch.float64
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert (probabilities >= 0).all()


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("outlier", [0.2, 0.5, 0.3]),
        ("outlier_reverse", [0.5, 0.2, 0.3]),
        ("weight_norm", [0.2, 0.5, 0.3]),
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("decreasing", [3 / 6, 2 / 6, 1 / 6]),
        ("increasing", [1 / 6, 2 / 6, 3 / 6]),
        ([1, 3, 0], [0.25, 0.75, 0]),
    ],
)
def test_what_each_distribution_is(distribution: str | list[float], expected: list[float]) -> None:
    assert sampling_probabilities([2.0, 5.0, 3.0], distribution).tolist() == pytest.approx(expected)


def test_reverse_order_hands_out_the_same_probabilities() -> None:
    outlier, reverse = (sampling_probabilities(LLAMA_2_7B, name) for name in ("outlier", "outlier_reverse"))
    assert torch.equal(outlier.sort().values, reverse.sort().values)
    assert reverse.argmin() == outlier.argmax() == 1
    assert reverse.argmax() == outlier.argmin() == 27


def test_distributions_without_a_score_need_none() -> None:
    assert sampling_probabilities(torch.zeros(2), "uniform").tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("ratios", "distribution", "message"),
    [
        ([0.0, 0.0], "outlier", "no weight of any block exceeds the threshold; lower `threshold`"),
        ([0.0, 0.0], "outlier_reverse", "lower `threshold`"),
        ([0.0, 0.0], "weight_norm", "load a trained model"),
        ([0.1, -0.1], "outlier", "scores: block 1 has -0.1; give finite numbers of at least 0"),
        ([float("nan"), 0.1], "outlier", "scores: block 0 has nan"),
        ([float("inf"), 0.1], "outlier_reverse", "scores: block 0 has inf"),
        ([], "outlier", "one number a block"),
        ([[0.1, 0.2]], "outlier", "one number a block"),
        ([0.1, 0.2], "outliers", "unknown 'outliers', did you mean 'outlier'\\?"),
        ([0.1, 0.2], "lisa", "unknown 'lisa'; give outlier, uniform, decreasing, .* or a list of weights"),
        ([0.1, 0.2], [1, 2, 3], "distribution: a list of 3 weights for 2 blocks; give one weight a block"),
        ([0.1, 0.2], [1, -2], "distribution: block 1 has -2.0"),
        ([0.1, 0.2], [0, 0], "distribution: all 2 are zero, give at least one positive weight"),
    ],
)
def test_bad_input_gets_one_clear_line(ratios: list[float], distribution: str | list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        sampling_probabilities(ratios, distribution)
    assert "\n" not in str(error.value)


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
        ([1.0, 1.0], 3, "^activated_layers: 3 is more than the model's 2 blocks"),
        ([1.0, 0.0, 0.0], 2, "^activated_layers: 2 is more than the 1 of 3 blocks whose probability is not zero"),
        ([1.0, 1.0], 0, "^activated_layers: 0 blocks leave nothing to train; give at least 1"),
        ([1.0, 1.0], -1, "^activated_layers: -1 blocks"),
    ],
)
def test_a_count_that_cannot_be_drawn_is_refused(ratios: list[float], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_blocks(sampling_probabilities(ratios), count, torch.Generator())
