from __future__ import annotations

from itertools import permutations

import numpy as np

from ows_lightning.sampling.inclusion import inclusion_probabilities


def test_inclusion_probabilities_equal_the_sum_over_all_orders() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    for draws in (1, 2, 3, 4):
        expected = np.zeros(5)
        for order in permutations(range(5), draws):
            left, chance = 1.0, 1.0
            for block in order:
                chance *= probabilities[block] / left
                left -= probabilities[block]
            expected[list(order)] += chance
        np.testing.assert_allclose(inclusion_probabilities(probabilities, draws), expected, rtol=1e-8)


def test_inclusion_probabilities_at_the_edges() -> None:
    np.testing.assert_allclose(inclusion_probabilities([1 / 80] * 80, 8), 0.1)
    np.testing.assert_array_equal(inclusion_probabilities([0.5, 0.5, 0.0], 2), [1, 1, 0])
    np.testing.assert_allclose(inclusion_probabilities([1e-9, 0.9, 0.1], 2), [1.0111e-8, 1, 1], rtol=1e-4)
