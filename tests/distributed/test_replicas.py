"""Whole weights on several processes: the same on all of them, also where their arithmetic is not."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, LayerwiseSampling
from ows_lightning.distributed import ddp
from ows_lightning.errors import UsageError
from ows_lightning.optim import resting, sharding
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling import sampler
from tests.distributed.fixtures import Arguments
from tests.distributed.launch import main_without_prediction, run
from tests.distributed.test_optimizer import refuse_gaps
from tests.tiny import tiny_batch

RANKS = 2


def everywhere(tensor: Tensor) -> list[Tensor]:
    """A tensor as each process has it."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach())
    return parts


def with_a_flipped_column(arguments: list[str]) -> None:
    """Rank 1 decomposes with another sign in one column, as another card might, and gradients take several messages."""
    dist.init_process_group("gloo")
    refuse_gaps()
    sharding.BUCKET = 20
    exact = torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = (t.clone() for t in exact(*args, **kwargs))
        u[..., 0] *= -1
        vh[..., 0, :] *= -1
        return u, s, vh

    if dist.get_rank() == 1:
        torch.linalg.svd = flipped  # type: ignore[assignment]
    for in_backward in (False, True):
        weights = [nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(0))) for shape in ((8, 6), (6, 8))]
        optimizer = GaLoreAdamW([{"params": weights, "rank": 2, "update_proj_gap": 2, "subspace": "svd"}], lr=0.1)
        optimizer.project_in_backward(in_backward)
        optimizer.ddp_averaging = True
        before = [w.detach().clone() for w in weights]
        for step in range(4):
            inputs = torch.rand(5, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            (inputs @ weights[1] @ weights[0]).square().mean().backward()
            optimizer.average_gradients()
            optimizer.step()
            optimizer.zero_grad()
        for weight, old in zip(weights, before, strict=True):
            assert not torch.equal(weight, old)
            assert torch.equal(*everywhere(weight)), f"in backward: {in_backward}"
            assert torch.equal(*everywhere(optimizer.state[weight]["projector"]))
    dist.destroy_process_group()


def test_replicas_take_the_first_ones_subspaces(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=with_a_flipped_column)


class ManualSteps(LightningModule):
    """Steps of two micro-batches by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        shapes = ((8, 6), (6, 8))
        self.weights = nn.ParameterList(torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)

    def training_step(self, inputs: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.optimizer.accumulating = batch_idx % 2 == 0
        self.manual_backward((inputs @ self.weights[1] @ self.weights[0]).square().mean() / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> GaLoreAdamW:
        group = {"params": list(self.weights), "rank": 2, "update_proj_gap": 2, "subspace": "svd"}
        return GaLoreAdamW([group], lr=0.1)


def with_manual_steps(arguments: list[str]) -> None:
    """Both processes together, and then this one with the rows of both, as one process would have them."""
    rows = torch.rand(8, 2, 5, 6, generator=torch.Generator().manual_seed(0))  # of micro-batches and processes
    module, alone = ManualSteps(), ManualSteps()
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp_layerwise", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows[:, int(os.environ["RANK"])], batch_size=None))
    optimizer = alone.configure_optimizers()
    for number, both in enumerate(rows):
        (both @ alone.weights[1] @ alone.weights[0]).square().mean().div(2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    for weight, expected in zip(module.weights, alone.weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_manual_steps_of_several_micro_batches_equal_those_of_one_process(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=with_manual_steps)


def without_averaging(arguments: list[str]) -> None:
    dist.init_process_group("gloo")
    weight = nn.Parameter(torch.rand(8, 6))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], lr=0.1)
    optimizer.project_in_backward()
    for _ in range(2):
        (weight @ torch.rand(6, 5)).square().mean().backward()
        if arguments == ["averaged"]:
            optimizer.average_gradients()
        optimizer.step()
    dist.barrier()  # who ends before the other has connected to it takes it down
    dist.destroy_process_group()


def test_replicas_that_drift_apart_say_so_once(tmp_path: Path) -> None:
    """As under Lightning's own DDP, which sees no gradient that was projected in backward."""
    said = "No average_gradients() came before this step"
    assert run([], tmp_path / "own", RANKS, target=without_averaging).count(said) == RANKS
    assert said not in run(["averaged"], tmp_path / "averaged", RANKS, target=without_averaging)


def with_another_rounding_at_rest(arguments: list[str]) -> None:
    """Rank 1's random subspaces are rounded otherwise, as another CPU might."""
    dist.init_process_group("gloo")
    exact = resting.random_subspace
    if dist.get_rank() == 1:
        resting.random_subspace = lambda p, *given: (exact(p.view(-1, 6), *given) + 1e-3).expand(*p.shape[:-2], -1, -1)
    weights = [nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(0))) for shape in ((8, 6), (3, 8, 6))]
    optimizer = GaLoreAdamW(weights, lr=0.1)
    optimizer.ddp_averaging = True
    before = [w.detach().clone() for w in weights]
    optimizer.rest(weights, rank=2)
    for step in range(2):
        inputs = torch.rand(5, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        torch.stack([(inputs @ w.mT).square().mean() for w in weights]).sum().backward()
        optimizer.average_gradients()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.keep_updates_separate(weights, optimizer.add_resting_updates)  # as a run with offloaded blocks does
    (weights[0].sum() + weights[1].sum()).backward()
    optimizer.step()
    resumed = GaLoreAdamW(weights, lr=0.1)
    resumed.ddp_averaging = True
    resumed.load_state_dict(optimizer.state_dict())  # adds what was learned to the weights
    for weight, old in zip(weights, before, strict=True):
        assert not torch.equal(weight, old)
        assert torch.equal(*everywhere(weight))
    dist.destroy_process_group()


def test_replicas_take_the_first_ones_subspaces_at_rest(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=with_another_rounding_at_rest)


def alone_with_offloaded_blocks(arguments: list[str]) -> None:
    """As on a GPU, whose processes send one another nothing that lies in host memory."""

    def refuse(tensor: Tensor, *more: Any, **named: Any) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    ddp.dist = sharding.dist = SimpleNamespace(broadcast=refuse, all_reduce=refuse, ReduceOp=dist.ReduceOp)
    module = CausalLMModule(arguments[0], rank=4, frozen_in="host", warmup_steps=0, update_proj_gap=1)
    rows = [{key: value[0] for key, value in tiny_batch(1, seed=seed).items()} for seed in range(8)]
    trainer = Trainer(
        strategy="ddp_layerwise", accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=2, logger=False,
        callbacks=[LayerwiseSampling(1, 1, "uniform", always_train=["norm"])], enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=2))
    assert trainer.optimizers[0].renewal_s > 0


def test_one_process_needs_no_other(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    run([str(model_dir())], tmp_path, 1, target=alone_with_offloaded_blocks)


def loaded_before(arguments: list[str]) -> None:
    """A module that has its weights already is fitted under ``fsdp2``, which could not average whole ones."""
    module, rows = CausalLMModule(arguments[0]), [{key: value[0] for key, value in tiny_batch(1).items()}]
    module.configure_model()
    trainer = Trainer(strategy="fsdp2", accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match=r"^trainer\.strategy: fsdp2 shards a model as it loads it; this one is loaded"):
        trainer.fit(module, DataLoader(rows))
    trainer.callbacks.append(EMAWeightAveraging(device="cpu"))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"^trainer\.callbacks: WeightAveraging copies the model"):
        trainer.fit(CausalLMModule(arguments[0]), DataLoader(rows))


def test_whole_weights_are_not_trained_as_if_they_were_sharded(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    run([str(model_dir())], tmp_path, 1, target=loaded_before)


def in_a_notebook(arguments: list[str]) -> None:
    """Processes that are forked from this one bring it their weights."""
    module = CausalLMModule(
        arguments[0], rank=None, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), warmup_steps=0
    )
    rows = [{key: value[0] for key, value in tiny_batch(1, seed=seed).items()} for seed in range(4)]
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    Trainer(strategy="ddp_notebook", max_steps=2, **options).fit(module, DataLoader(rows))
    before = CausalLMModule(arguments[0])
    before.configure_model()
    assert not any(map(torch.equal, module.parameters(), before.parameters()))
    sampling = LayerwiseSampling(1, 1, "uniform")
    with pytest.raises(ProcessRaisedException, match="in a notebook set devices: 1, or start a script with ddp_layerwise"):
        Trainer(strategy="ddp_notebook", callbacks=[sampling], max_steps=2, **options).fit(before, DataLoader(rows))


@pytest.mark.slow
def test_what_forked_processes_have_trained_is_kept(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    run([str(model_dir())], tmp_path, 1, target=in_a_notebook)


def split_tensors(arguments: list[str]) -> None:
    """The strategy of Lightning by which fsdp2 works, as it is by itself."""
    rows = [{key: value[0] for key, value in tiny_batch(1).items()}]
    trainer = Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=2, max_steps=1, logger=False)
    with pytest.raises(UsageError, match="splits tensors, too; write strategy: fsdp2"):
        trainer.fit(CausalLMModule(arguments[0]), DataLoader(rows))


@pytest.mark.slow
def test_tensors_that_are_split_are_refused(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    run([str(model_dir())], tmp_path, RANKS, target=split_tensors)


def with_a_gradient_missing(arguments: list[str]) -> None:
    """An expert of rank 1 sees no token in a step that finds subspaces; on rank 0 its gradient is not the last to come."""
    dist.init_process_group("gloo")
    weights = [nn.Parameter(torch.full((8, 8), value)) for value in (1.0, 2.0, 3.0)]
    optimizer = GaLoreAdamW([{"params": weights, "rank": 2}], lr=0.1)
    optimizer.project_in_backward()
    optimizer.ddp_averaging = True
    used = weights if dist.get_rank() == 0 else [weights[0], weights[2]]
    inputs, loss = torch.eye(8) + dist.get_rank(), torch.zeros(())
    for weight in used:
        loss = loss + (inputs @ weight).square().sum() * weight[0, 0].detach()
    loss.backward()
    optimizer.average_gradients()
    for index, gradient in enumerate(optimizer.gradients()):
        mean = (
            sum(2 * x.T @ x @ weights[index] * (index + 1) for x in (torch.eye(8), torch.eye(8) + 1)[: 1 + (index != 1)]) / 2
        )
        torch.testing.assert_close(gradient.norm(), mean.detach().norm(), msg=f"weight {index}")
    optimizer.step()
    for weight in weights:
        assert torch.equal(*everywhere(weight))
    dist.destroy_process_group()


def test_gradients_are_averaged_with_those_of_the_same_weight(tmp_path: Path) -> None:
    run([], tmp_path, RANKS, target=with_a_gradient_missing)


def with_other_norms(arguments: list[str]) -> None:
    """Rank 1's norms of the blocks' gradients are not rank 0's."""
    exact, calls = sampler.total_norm, itertools.count()
    if os.environ["RANK"] == "1":
        sampler.total_norm = lambda tensors: exact(tensors) * 1000 ** (next(calls) % 2)
    main_without_prediction(arguments)


@pytest.mark.slow
def test_replicas_take_the_first_ones_probabilities(arguments: Arguments, tmp_path: Path) -> None:
    more = ["--sampling.distribution=gradient_norm", "--sampling.interval_steps=1", "--trainer.max_steps=12"]
    more += ["--trainer.callbacks+=tests.distributed.probe.Probe", f"--trainer.callbacks.folder={tmp_path / 'probe'}"]
    run(arguments(*more, ranks=2, strategy="ddp_layerwise"), tmp_path, RANKS, target=with_other_norms)
    ranks = [json.loads((tmp_path / "probe" / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    assert ranks[0]["frozen"] == ranks[1]["frozen"]
