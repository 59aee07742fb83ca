"""Norms of gradients, whole and sharded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ows_lightning.optim import sharding
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.sharding import clip_, total_norm


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# Of float16 the norm would be infinite, of bfloat16 it would have three digits.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_norm_is_taken_in_float32(dtype: torch.dtype, sharded: bool, mesh: DeviceMesh) -> None:
    tensors = [torch.full((100_000,), 300.0).to(dtype), torch.rand(3, 3)]
    expected = torch.cat([t.flatten().double() for t in tensors]).norm()
    norm = total_norm([distribute_tensor(t, mesh, [Shard(0)]) for t in tensors] if sharded else tensors)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), expected, rtol=1e-4, atol=0)


def test_a_norm_of_nothing_is_zero() -> None:
    assert total_norm([]) == 0


@pytest.mark.parametrize("rank", [None, 2])
def test_a_large_gradient_in_half_precision_is_no_reason_to_skip(rank: int | None) -> None:
    weight = nn.Parameter(torch.zeros(400, 300, dtype=torch.float16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank}], lr=0.1)
    weight.grad = torch.full_like(weight, 300.0)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert weight.float().mean() < 0


def test_a_model_may_be_split_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[tuple[torch.device, torch.device]] = []

    def multiply(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
        scaled.extend((tensor.device, factor.device) for tensor in tensors)  # a card's kernel takes no other card's scalar

    monkeypatch.setattr(sharding, "foreach_mul_", multiply)
    clip_([torch.ones(2), torch.ones(2, device="meta"), torch.ones(3)], torch.tensor(4.0), 1.0)
    assert len(scaled) == 3
    assert all(tensor == factor for tensor, factor in scaled)


def test_clipping_leaves_good_gradients_good() -> None:
    gradients = [torch.ones(2), torch.tensor([1.0, float("nan")])]
    clip_(gradients, total_norm(gradients), 1.0)
    assert [bool(gradient.isfinite().all()) for gradient in gradients] == [True, False]
