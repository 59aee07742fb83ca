"""What people report of projected optimizers elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from tests.distributed.launch import run
from tests.regressions.runs import fit, galore, net, projected, step

ModelDir = Callable[..., Path]


def test_galore_26() -> None:
    """GaLore 26: after a NaN the loss is 0 and training is lost.

    Here the step is skipped as a whole, and training goes on from the weights before it.
    """
    model = net()
    optimizer = projected(model)
    step(model, optimizer, 0)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.full((2, 24), float("nan"))).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    step(model, optimizer, 1)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("subspace", ["randomized", "svd"])
@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny", "huge"])
def test_galore_58(subspace: str, kind: str) -> None:
    """GaLore 58: the SVD of an ill-conditioned gradient does not converge.

    Here either way to a subspace takes such gradients, and the weights stay finite.
    """
    model = net()
    optimizer = projected(model, subspace=subspace, update_proj_gap=1)
    for number in range(3):
        for p in model.parameters():
            gradient = torch.ones_like(p) if kind == "rank one" else torch.randn_like(p)
            p.grad = gradient * {"zero": 0.0, "rank one": 1.0, "tiny": 1e-30, "huge": 1e15}[kind]
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.isfinite().all() for p in model.parameters()), number


def test_galore_35_and_ms_swift_10161() -> None:
    """GaLore 35, ms-swift 10161: projectors are pickled into checkpoints, so that resuming fails.

    Here the state is tensors and numbers, is read with `weights_only`, and goes on bit for bit.
    """
    whole, again = net(), net()
    optimizer = projected(whole)
    for number in range(3):
        step(whole, optimizer, number)
    file = io.BytesIO()
    torch.save({"weights": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["weights"])
    resumed = projected(again)
    resumed.load_state_dict(saved["optimizer"])
    for number in range(3, 6):
        step(whole, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_galore_53() -> None:
    """GaLore 53: it takes as much memory as full fine-tuning.

    Here states have the rank's size, and after backward no full gradient of a projected matrix is left.
    """
    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = GaLoreAdamW([{"params": [model.weight], "rank": 8}], lr=1e-3)
    optimizer.project_in_backward()
    for _ in range(2):
        model(torch.randn(4, 256)).square().mean().backward()
        assert model.weight.grad is None
        optimizer.step()
    state = [value for value in optimizer.state[model.weight].values() if torch.is_tensor(value)]
    assert sum(value.numel() for value in state) < 0.1 * 2 * model.weight.numel()


@pytest.mark.parametrize("in_backward", [False, True])
def test_galore_78(in_backward: bool) -> None:
    """GaLore 78: with gradient accumulation it is silently wrong.

    Here four micro-batches give the weights of one large batch.
    """
    whole, parts = net(), net()
    optimizers = [projected(model, subspace="svd", update_proj_gap=2) for model in (whole, parts)]
    for optimizer in optimizers if in_backward else ():
        optimizer.project_in_backward()
    for number in range(4):
        step(whole, optimizers[0], number)
        step(parts, optimizers[1], number, parts=4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_llama_factory_5887(model_dir: ModelDir, tmp_path: Path) -> None:
    """LLaMA-Factory 5887: layerwise GaLore does not know gradient accumulation.

    Here projection in backward takes Lightning's `accumulate_grad_batches`, with the loss of one large batch.
    """
    directory, losses = str(model_dir(num_hidden_layers=2)), []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if "train_loss" in trainer.callback_metrics:
                losses[-1][trainer.global_step] = trainer.callback_metrics["train_loss"].item()

    for batch_size, accumulated in ((8, 1), (2, 4)):
        losses.append({})
        module = CausalLMModule(directory, rank=4, optimizer=galore, lr_scheduler_type="constant", subspace="svd")
        fit(module, tmp_path, Losses(), batch_size=batch_size, accumulate_grad_batches=accumulated)
    assert sorted(losses[0]) == [1, 2, 3, 4]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_transformers_31710(model_dir: ModelDir, tmp_path: Path) -> None:
    """transformers 31710: layerwise GaLore has a dummy scheduler, so that its learning rate stays as it is.

    Here the rate of each step is that of the schedule, and with a rate of 0 nothing moves.
    """
    rates = []

    class Rates(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    module = CausalLMModule(str(model_dir()), rank=4, optimizer=galore, lr_scheduler_type="linear", warmup_steps=0.0)
    fit(module, tmp_path, Rates())
    used = sorted(set(rates), reverse=True)
    assert used[:4] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_axolotl_1448(model_dir: ModelDir, tmp_path: Path) -> None:
    """axolotl 1448: with layerwise GaLore the gradient norm is reported as 0.

    Here it is that of what the optimizer consumes.
    """
    norms = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            norms.append(trainer.callback_metrics["grad_norm"].item())

    fit(CausalLMModule(str(model_dir()), rank=4, optimizer=galore), tmp_path, Norms(), gradient_clip_val=0.1)
    assert len(norms) == 4
    assert all(norm > 0 for norm in norms)


@pytest.mark.slow
def test_llama_factory_2926(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """LLaMA-Factory 2926: layerwise GaLore does not know several processes.

    Here two processes train the weights of one.
    """
    trained = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        strategy = "ddp_layerwise" if ranks > 1 else "auto"
        words = arguments("--trainer.max_steps=12", ranks=ranks, strategy=strategy, runs=folder / "runs")
        run(words, folder, ranks)
        trained.append(load_file(folder / "runs" / "version_0" / "model" / "model.safetensors"))
    for name, weight in trained[0].items():
        assert (trained[1][name] - weight).norm() <= 1e-4 * weight.norm(), name
