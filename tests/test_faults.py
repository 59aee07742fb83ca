"""Gradients that are not finite: single steps are left out, and a run of them ends the run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ows_lightning.errors import RunError
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.trainer import OWSTrainer
from tests.tiny import tiny_batch


class Unstable(CausalLMModule):
    """Its loss is not a number in some steps."""

    bad_steps: Collection[int] = ()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step in self.bad_steps else loss


def fit(directory: Path, folder: Path, optimizer: Any, bad_steps: Collection[int], max_steps: int) -> Unstable:
    rank = 8 if optimizer is GaLoreAdamW else None
    module = Unstable(str(directory), optimizer=lambda params: optimizer(params, lr=1e-3), rank=rank, warmup_steps=0)
    module.bad_steps = bad_steps
    batch = tiny_batch(rows=64)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(64)]
    saved = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    trainer = OWSTrainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_steps=max_steps, callbacks=[saved], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, torch.optim.AdamW])
def test_a_bad_step_changes_no_weight(optimizer: Any, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    fit(model_dir(), tmp_path, optimizer, bad_steps=[2], max_steps=4)
    states = [
        torch.load(next((tmp_path / "checkpoints").glob(f"*step={step}.ckpt")), weights_only=True)["state_dict"]
        for step in (1, 2, 3, 4)
    ]
    changed = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in itertools.pairwise(states)]
    assert changed == [True, False, True]
    assert all(weight.isfinite().all() for weight in states[-1].values())


@pytest.mark.parametrize("optimizer", [GaLoreAdamW, torch.optim.AdamW])
def test_ten_bad_steps_in_a_row_end_the_run(optimizer: Any, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"10 steps in a row.*last checkpoint is '.*step=13.*ckpt'"):
        fit(model_dir(), tmp_path, optimizer, bad_steps=[0, *range(3, 16)], max_steps=16)
