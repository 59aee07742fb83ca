"""Weights that are no numbers are found without memory for a copy of them."""

from __future__ import annotations

import pytest
import torch

from ows_lightning.memory.tracker import MemoryTracker
from ows_lightning.models.large_tensors import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finds_what_is_no_number(dtype: torch.dtype) -> None:
    assert all_finite(torch.empty(0, dtype=dtype))
    for value in (0.0, float("nan"), float("inf"), float("-inf")):
        weight = torch.linspace(-1, 1, 10_000).to(dtype).view(100, 100)
        weight[37, 5] = value
        for tensor in (weight, weight.T, weight[37, 5]):
            assert all_finite(tensor) == (value == 0.0)


def test_needs_no_memory() -> None:
    weight = torch.ones(1 << 16)
    with MemoryTracker() as tracker:
        assert all_finite(weight)
    assert sum(sum(sizes.values()) for sizes in tracker.peaks().values()) < weight.nbytes / 1000
