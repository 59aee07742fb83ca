from __future__ import annotations

from typing import get_args

import pytest
import torch

from ows_lightning.errors import UsageError
from ows_lightning.sampling.distributions import SCORE_NAMES, Distribution, sampling_probabilities
from tests.published import LLAMA_2_7B


def test_published_ratios_of_llama_2_7b() -> None:
    probabilities = sampling_probabilities(torch.tensor(LLAMA_2_7B))
    assert probabilities.shape == (32,)
    published = {0: 0.123, 1: 0.135, 27: 0.008, 31: 0.038}
    assert {block: round(probabilities[block].item(), 3) for block in published} == published


@pytest.mark.parametrize("distribution", [*get_args(Distribution), [1, 0, 2.5, 4]])
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


@pytest.mark.parametrize("distribution", [name for name in get_args(Distribution) if name not in SCORE_NAMES])
def test_distributions_without_a_score_need_none(distribution: str) -> None:
    without, given = (sampling_probabilities(scores, distribution) for scores in ([0.0, 0.0], [1.0, 3.0]))
    assert torch.equal(without, given)


def test_weights_whose_sum_overflows_are_weights() -> None:
    assert sampling_probabilities([1.0, 1.0], [1e308, 1e308]).tolist() == [0.5, 0.5]


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
        ([0.1, 0.2], "outliers", "unknown 'outliers'; did you mean 'outlier'\\?"),
        ([0.1, 0.2], "lisa", "unknown 'lisa'; give outlier, uniform, decreasing, .* or a list of weights"),
        ([0.1, 0.2], [1, 2, 3], "sampling.distribution: a list of 3 weights for 2 blocks; give one weight a block"),
        ([0.1, 0.2], [1, -2], "distribution: block 1 has -2.0"),
        ([0.1, 0.2], [0, 0], "distribution: all 2 are zero, give at least one positive weight"),
    ],
)
def test_bad_input_gets_one_clear_line(ratios: list[float], distribution: str | list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        sampling_probabilities(ratios, distribution)
    assert "\n" not in str(error.value)
