"""What an optimizer step cost, as it is logged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from ows_lightning.callbacks import throughput
from ows_lightning.callbacks.throughput import Throughput
from ows_lightning.module import CausalLMModule
from tests.tiny import tiny_batch


def test_figures_are_of_all_micro_batches_of_a_step(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()  # a batch lasts from one look at it to the next: a second
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    batch = tiny_batch(rows=2, length=12)
    batch["labels"][:, :5] = -100
    batch["attention_mask"][0, 10:], batch["labels"][0, 10:] = 0, -100
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=2, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Throughput()],
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(model_dir()), rank=4), DataLoader([batch] * 4, batch_size=None))
    figures = {name: trainer.callback_metrics[name].item() for name in ("tokens", "target_tokens", "tokens_per_second")}
    assert figures == {"tokens": 4 * 22, "target_tokens": 4 * 12, "tokens_per_second": 22.0}
