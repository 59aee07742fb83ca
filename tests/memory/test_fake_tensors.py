"""Operators on fake tensors against the same ones on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ows_lightning.memory.fake_tensors import FakeOperators
from ows_lightning.memory.tracker import MemoryTracker


def layouts(function: Callable[[Tensor], Any]) -> list[tuple[Any, ...]]:
    """What a function returns for a matrix: layouts, and whether the storage is the matrix's."""
    matrix = torch.zeros(6, 8)[:, 2:]
    result = function(matrix)
    storage = matrix.untyped_storage()
    return [
        (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t is matrix, t.untyped_storage()._cdata == storage._cdata)
        for t in [*tree_leaves(result), matrix]
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.bfloat16() @ x.mT.bfloat16(),
        lambda x: x.add_(1),
        lambda x: x.t_(),
        lambda x: [x.view(6, 2, 3), x[1:3], x.mT, x.reshape(36), x.view(torch.int32)],
        lambda x: torch.add(x, 1, out=torch.empty(6, 6)),
        lambda x: torch.linalg.svd(x, full_matrices=False),
        lambda x: x.split(1, dim=-1),
        lambda x: torch._foreach_mul([x, x], 2.0),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    ],
)
def test_returns_what_real_operators_do(function: Callable[[Tensor], Any]) -> None:
    expected = layouts(function)
    for _ in range(2):  # asked and cached
        with MemoryTracker(operate=FakeOperators()):
            assert layouts(function) == expected


def test_backward_and_memory_are_those_of_real_tensors() -> None:
    def peak(tracker: MemoryTracker) -> dict[str, int]:
        with tracker:
            tracker.begin_span(("backward",))
            x = torch.ones(100, 50, requires_grad=True)
            (x.exp().mul(2).sum(0) ** 2).sum().backward()
            tracker.label("gradients", [x.grad])
            tracker.begin_span(())
        return tracker.peaks()[("backward",)]

    assert peak(MemoryTracker(operate=FakeOperators())) == peak(MemoryTracker())


def test_has_no_address_that_a_kernel_could_read_from() -> None:
    with MemoryTracker(operate=FakeOperators()):
        made = torch.zeros(4)
    with pytest.raises(RuntimeError, match="no address"):
        made.data_ptr()


def test_work_by_chunks_is_followed_for_those_that_differ() -> None:
    with MemoryTracker(operate=FakeOperators()):
        matrix = torch.zeros(10, 4)
        assert len(matrix.split(3)) == 4
        with torch.no_grad():
            assert [len(part) for part in matrix.split(3)] == [3, 3, 1]
            assert len(matrix.split(4)) == 3
