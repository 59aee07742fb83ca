"""Gradients that are not finite: single steps are left out, and a run of them ends the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ows_lightning import OWSTrainer
from ows_lightning.callbacks.stop_on_nan import StopOnNaN
from ows_lightning.errors import RunError
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from tests.tiny import tiny_batch


class Unstable(CausalLMModule):
    """Its loss is not a number in some steps."""

    bad_steps: Collection[int] = ()
    spoil: Callable[[Tensor], Tensor]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return self.spoil(loss) if self.trainer.global_step in self.bad_steps else loss


def not_a_number(loss: Tensor) -> Tensor:
    return loss * float("nan")


def infinite(loss: Tensor) -> Tensor:
    return loss + float("inf")  # whose gradient is finite


def fit(
    directory: Path, folder: Path, optimizer: Any, bad_steps: Collection[int], max_steps: int,
    spoil: Callable[[Tensor], Tensor] = not_a_number, save_every: int = 1,
) -> Unstable:  # fmt: skip
    rank = 8 if optimizer is GaLoreAdamW else None
    module = Unstable(str(directory), optimizer=lambda params: optimizer(params, lr=1e-3), rank=rank, warmup_steps=0)
    module.bad_steps, module.spoil = bad_steps, spoil
    batch = tiny_batch(rows=64)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(64)]
    saved = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=save_every, save_top_k=-1)
    trainer = OWSTrainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_steps=max_steps, callbacks=[saved], logger=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("spoil", [not_a_number, infinite])
@pytest.mark.parametrize("optimizer", [GaLoreAdamW, torch.optim.AdamW])
def test_a_bad_step_changes_no_weight(
    optimizer: Any, spoil: Callable[[Tensor], Tensor], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    fit(model_dir(), tmp_path, optimizer, bad_steps=[2], max_steps=4, spoil=spoil)
    states = [
        torch.load(next((tmp_path / "checkpoints").glob(f"*step={step}.ckpt")), weights_only=True)["state_dict"]
        for step in (1, 2, 3, 4)
    ]
    changed = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in itertools.pairwise(states)]
    assert changed == [True, False, True]
    assert all(weight.isfinite().all() for weight in states[-1].values())


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, torch.optim.AdamW])
def test_ten_bad_steps_in_a_row_end_the_run(optimizer: Any, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"10 steps in a row.*last checkpoint is '.*step=12.*ckpt'"):
        fit(model_dir(), tmp_path, optimizer, bad_steps=[0, *range(3, 16)], max_steps=16)


def test_a_run_without_a_checkpoint_leaves_one_of_its_last_good_weights(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"10 steps in a row.*last checkpoint is '.*stopped-step=12\.ckpt'"):
        fit(model_dir(), tmp_path, GaLoreAdamW, bad_steps=range(2, 16), max_steps=16, save_every=50)
    stopped = torch.load(tmp_path / "checkpoints" / "stopped-step=12.ckpt", weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in stopped.values())


class SomebodyElses(LightningModule):
    """Without figures of its steps: those that GaLoreAdamW skips are counted."""

    def __init__(self, bad_steps: Collection[int]) -> None:
        super().__init__()
        self.net, self.bad_steps = torch.nn.Linear(4, 4), bad_steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        return not_a_number(loss) if self.trainer.global_step in self.bad_steps else loss

    def configure_optimizers(self) -> GaLoreAdamW:
        return GaLoreAdamW(self.parameters(), lr=1e-3)


def without_files(folder: Path, max_steps: int, *callbacks: Callback) -> OWSTrainer:
    return OWSTrainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_steps=max_steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
    )  # fmt: skip


def test_ten_bad_steps_in_a_row_end_the_run_of_any_module(tmp_path: Path) -> None:
    trainer = without_files(tmp_path, 30)
    with pytest.raises(RunError, match="10 steps in a row"):
        trainer.fit(SomebodyElses([0, *range(2, 11), *range(12, 30)]), DataLoader(torch.ones(30, 4)))  # type: ignore[arg-type]
    assert trainer.global_step == 22


class KeepsItsOptimizer(SomebodyElses):
    def __init__(self) -> None:
        super().__init__([])
        self.optimizer = super().configure_optimizers()

    def configure_optimizers(self) -> GaLoreAdamW:
        return self.optimizer


def test_bad_steps_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    stops, module = StopOnNaN(), KeepsItsOptimizer()

    def fit(*bad_steps: int) -> int:
        module.bad_steps = bad_steps
        trainer = without_files(tmp_path, 12, stops)
        trainer.fit(module, DataLoader(torch.ones(12, 4)))  # type: ignore[arg-type]
        return trainer.global_step

    with pytest.raises(RunError, match="10 steps in a row"):
        fit(*range(12))
    assert fit(0) == 12  # not the eleventh in a row
    assert fit(*range(1, 10)) == 12  # nine, though the optimizer has skipped others before


class OneBadGradient(CausalLMModule):
    def on_after_backward(self) -> None:
        self.get_parameter("model.model.norm.weight").grad[0] = float("nan")


def test_the_weight_whose_gradient_is_bad_is_named_also_with_clipping(
    model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = OneBadGradient(str(model_dir()), rank=8)
    rows = DataLoader([{key: value[0] for key, value in tiny_batch(rows=1).items()}])  # type: ignore[var-annotated,arg-type]
    OWSTrainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_steps=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, rows)  # fmt: skip
    (warning,) = [record.getMessage() for record in caplog.records if "Step skipped" in record.getMessage()]
    assert "the gradient of model.norm.weight holds NaN" in warning
