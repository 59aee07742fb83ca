"""Resuming one's own module: what a schedule made of an option stays, what is configured anew holds, of every optimizer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from ows_lightning.callbacks.resume import ContinueMetricsCSV, Resume
from ows_lightning.checkpoints.io import AtomicCheckpointIO
from ows_lightning.data import InstructionDataModule
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.callbacks.test_run_folder import NotTheFirst
from tests.data.samples import tiny_tokenizer


class Scheduled(LightningModule):
    """A layer whose loss never falls, and a schedule that PyTorch has."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.layer, self.schedule = nn.Linear(4, 1), schedule

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean() + 1
        self.log("loss", 1.0, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.schedule == "plateau":
            plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}
        cycle = OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class TwoOptimizers(LightningModule):
    def __init__(self, rates: tuple[float, float]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers, self.rates = nn.ModuleList(nn.Linear(4, 1) for _ in rates), rates

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for layer, optimizer in zip(self.layers, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(layer.parameters(), lr) for layer, lr in zip(self.layers, self.rates, strict=True)]


def fit(module: LightningModule, folder: Path, steps: int, ckpt_path: Path | None = None) -> Trainer:
    rows = torch.arange(8.0).reshape(2, 4)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[Resume()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=1), ckpt_path=ckpt_path)
    return trainer


def test_a_checkpoint_of_a_plain_trainer_takes_no_rows_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text("epoch,accuracy\n0,0.5\n")  # somebody else's
    module = TwoOptimizers((0.1, 0.1))
    fit(module, tmp_path, steps=2).save_checkpoint("plain/model.ckpt")
    logger = CSVLogger(tmp_path / "runs", name="")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ContinueMetricsCSV()], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=1), ckpt_path="plain/model.ckpt")
    assert not list(tmp_path.glob("runs/**/metrics.csv"))  # nothing was logged


class Logged(Scheduled):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("steps", float(self.global_step))
        return super().training_step(batch, batch_idx)


def test_the_curves_of_a_run_that_was_moved_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process alone copies them."""

    def run(folder: Path, steps: int, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=CSVLogger(folder, name="", version=0),
            callbacks=[Resume(), ContinueMetricsCSV()], log_every_n_steps=1, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip
        trainer.fit(Logged("one cycle"), DataLoader(torch.ones(4, 4), batch_size=1), ckpt_path=ckpt_path)
        return trainer

    run(tmp_path / "first", 4).save_checkpoint(tmp_path / "first" / "version_0" / "checkpoints" / "a.ckpt")
    (tmp_path / "first").rename(tmp_path / "moved")
    run(tmp_path / "second", 8, tmp_path / "moved" / "version_0" / "checkpoints" / "a.ckpt")
    with (tmp_path / "second" / "version_0" / "metrics.csv").open(newline="") as file:
        assert [float(row["steps"]) for row in csv.DictReader(file) if row["steps"]] == [*range(8)]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run(tmp_path / "third", 8, tmp_path / "moved" / "version_0" / "checkpoints" / "a.ckpt", strategy=NotTheFirst("cpu"))
    assert not (tmp_path / "third").exists()


def test_settings_that_are_paths_can_be_saved(tmp_path: Path) -> None:
    """As text: a checkpoint holds plain values only."""
    sampling = LayerwiseSampling(scores=tmp_path / "scores.json")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[sampling, resume := Resume()])
    rows = {tmp_path / "rows.jsonl": 2.0}
    trainer.datamodule = InstructionDataModule(rows, tokenizer=tiny_tokenizer())  # type: ignore[arg-type, attr-defined]
    checkpoint: dict[str, Any] = {"state_dict": {}, "loops": {}, "global_step": 0}
    resume.on_save_checkpoint(trainer, Scheduled("one cycle"), checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["changeable_settings"]
    assert saved["sampling.scores"] == str(tmp_path / "scores.json")
    assert saved["data.dataset"] == {str(tmp_path / "rows.jsonl"): 2.0}


@pytest.mark.parametrize("schedule", ["plateau", "one cycle"])
def test_what_a_schedule_made_of_an_option_stays(schedule: str, tmp_path: Path) -> None:
    whole, half, resumed = (Scheduled(schedule) for _ in range(3))
    half.load_state_dict(whole.state_dict())
    expected = fit(whole, tmp_path, 8)
    fit(half, tmp_path, 4).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, tmp_path, 8, tmp_path / "half.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected.optimizers[0].param_groups[0]["lr"]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_rate_that_is_configured_anew_holds_for_its_optimizer(tmp_path: Path) -> None:
    fit(TwoOptimizers((1e-3, 1e-3)), tmp_path, 4).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(TwoOptimizers((1e-3, 5e-4)), tmp_path, 8, tmp_path / "half.ckpt")
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [1e-3, 5e-4]


class Headed(Scheduled):
    def __init__(self) -> None:
        super().__init__("none")
        self.head = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.head

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.head], lr=1e-2)


class Unfrozen(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.layer)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.layer, optimizer)


def test_groups_that_were_added_in_training_are_the_checkpoints(tmp_path: Path) -> None:
    def run(epochs: int, *ours: Resume, ckpt_path: Path | None = None) -> tuple[LightningModule, Trainer]:
        torch.manual_seed(0)
        module = Headed()
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, callbacks=[*ours, Unfrozen()],
        )  # fmt: skip
        trainer.fit(module, DataLoader(torch.arange(8.0).reshape(2, 4), batch_size=1), ckpt_path=ckpt_path)
        return module, trainer

    run(2, Resume())[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, lightnings = run(4, Resume(), ckpt_path=tmp_path / "half.ckpt"), run(4, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed[0].state_dict(), lightnings[0].state_dict(), rtol=0, atol=0)
    assert [group["lr"] for group in resumed[1].optimizers[0].param_groups] == [1e-2, 1e-3]
