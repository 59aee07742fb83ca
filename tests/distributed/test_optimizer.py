"""GaLoreAdamW on sharded weights against the same optimizer on whole ones, wherever the shards lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ows_lightning.optim.galore import GaLoreAdamW
from tests.distributed.launch import run

RANKS = 3
SHAPES = [(12, 7), (7, 12), (10, 10), (5, 9, 6), (2, 6, 9)]  # tall, wide, square, experts: more and fewer than processes


def gradient(step: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((step, shape))))


def optimizer_of(parameters: list[nn.Parameter], **settings: object) -> GaLoreAdamW:
    return GaLoreAdamW([{"params": parameters, "rank": 4, "update_proj_gap": 3, **settings}], lr=0.1, **OPTIONS)


OPTIONS: dict[str, object] = {"weight_decay": 0.1}


def refuse_gaps() -> None:
    """Has this process's messages refused as NCCL does, which takes no tensor that is transposed or has gaps."""
    for name in ("broadcast", "all_reduce"):
        send = getattr(dist, name)

        def sent(tensor: Tensor, *args: Any, send: Callable[..., Any] = send, **kwargs: Any) -> Any:
            assert tensor.is_contiguous(), f"{send.__name__}: Tensors must be contiguous"
            return send(tensor, *args, **kwargs)

        setattr(dist, name, sent)


def compare_with_whole_weights(arguments: list[str]) -> None:
    dist.init_process_group("gloo")
    refuse_gaps()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for renewal, proj_type, shape in itertools.product(("keep", "reproject", "reset"), ("std", "reverse_std"), SHAPES):
        OPTIONS["moments_at_renewal"] = renewal
        for placement in [*(Shard(dim) for dim in range(len(shape))), Replicate()]:
            start = gradient(-1, shape)
            whole, sharded = nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start, mesh, [placement]))
            optimizers = [optimizer_of([p], proj_type=proj_type) for p in (whole, sharded)]
            for step in range(5):  # two subspaces
                whole.grad = gradient(step, shape)
                sharded.grad = distribute_tensor(gradient(step, shape), mesh, [placement])
                for optimizer in optimizers:
                    optimizer.step()
            what = f"{renewal} {proj_type} {shape} {placement}"
            assert torch.allclose(sharded.full_tensor(), whole, rtol=1e-4, atol=1e-5), what
            if renewal == "reset":  # a setting that rest does not know
                rest_alike(whole, sharded, optimizers, what)
            states = [optimizer.state[p] for optimizer, p in zip(optimizers, (whole, sharded), strict=True)]
            # A state that was saved whole loads into shards, each process taking its part.
            fresh = optimizer_of([sharded], proj_type=proj_type)
            fresh.load_state_dict(optimizers[0].state_dict())
            for key, value in states[0].items():
                loaded, own = fresh.state[sharded][key], states[1][key]
                if key not in ("step", "rest"):
                    assert isinstance(own, DTensor), f"{what} {key}"
                    assert loaded.placements == own.placements, f"{what} {key}"
                    assert torch.equal(loaded.full_tensor(), value), f"{what} {key}"
    dist.destroy_process_group()


def rest_alike(whole: nn.Parameter, sharded: nn.Parameter, optimizers: list[GaLoreAdamW], what: str) -> None:
    for optimizer, p in zip(optimizers, (whole, sharded), strict=True):
        optimizer.rest([p], rank=3, seed=7)
    for step in range(3):
        whole.grad = gradient(step, tuple(whole.shape))
        sharded.grad = distribute_tensor(whole.grad, sharded.device_mesh, sharded.placements)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(sharded.full_tensor(), whole, rtol=1e-4, atol=1e-5), what


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=compare_with_whole_weights)


def one_process_sees_a_nan(arguments: list[str]) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(gradient(-1, (12, 7)), mesh, [Shard(0)]))
    optimizer, before = optimizer_of([weight]), weight.full_tensor()
    for step in range(2):
        values = gradient(step, (12, 7))
        if step == 1:
            values[0, 0] = float("nan")  # the first process's row
        weight.grad = distribute_tensor(values, mesh, [Shard(0)])
        optimizer.step()
        assert optimizer.skipped_steps == step
        assert torch.equal(weight.full_tensor(), before) == (step == 1)
        before = weight.full_tensor()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_skip_a_step_in_which_one_sees_a_nan(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=one_process_sees_a_nan)
