"""`model.gradient_checkpointing: auto` in a run: decided before it trains, and a line where it can't be."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from ows_lightning.callbacks import auto_gradient_checkpointing
from ows_lightning.callbacks.auto_gradient_checkpointing import MEMORY_FRACTION, AutoGradientCheckpointing
from ows_lightning.memory.cards import available_bytes
from ows_lightning.memory.plan_settings import settings_of_run
from ows_lightning.models.execution import count_checkpointed
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model

TOO_MUCH = 10**7  # rows


@pytest.mark.parametrize(
    ("rows", "name", "recomputing", "said"),
    [
        (4, None, 0, "auto, 0 of 4 blocks recompute (18.0 GB"),
        (TOO_MUCH, None, 4, "auto, 4 of 4 blocks recompute (18.0 GB"),
        (4, "no/such-model", 4, "auto is true, the memory is not predicted ("),
    ],
    ids=["fits", "never fits", "not predicted"],
)
def test_auto_is_decided_before_the_run_trains(
    rows: int, name: str | None, recomputing: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ows_lightning.callbacks.auto_gradient_checkpointing.available_bytes", lambda *_: 20 * 10**9)
    caplog.set_level(logging.INFO, "ows_lightning")
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = {
        "model": {"model_name_or_path": name or str(tmp_path), "optimizer": GaLoreAdamW, "gradient_checkpointing": "auto"},
        "data": {"batch_size": rows, "max_seq_length": 12}, "trainer": {}, "sampling": None,
    }  # fmt: skip
    module = CausalLMModule(str(tmp_path), gradient_checkpointing="auto", rank=4, warmup_steps=0)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[AutoGradientCheckpointing(config)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([tiny_batch()], batch_size=None))
    assert count_checkpointed(module.language_model) == recomputing
    assert module.hparams["gradient_checkpointing"] == "auto"
    assert len([line for line in caplog.messages if line.startswith("model.gradient_checkpointing: " + said)]) == 1


def test_weights_that_are_loaded_already_are_part_of_what_a_run_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    weights = [torch.zeros(10), torch.zeros(10, device="meta")]
    assert available_bytes(torch.device("cpu"), weights, processes=2) == 1000 // 2 + 40


def test_a_process_may_take_its_share_of_what_is_free_or_holds_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    budgets: list[float] = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(auto_gradient_checkpointing, "fewest_checkpointed_blocks", lambda _, most: budgets.append(most) or 3)
    module = CausalLMModule(str(tmp_path), gradient_checkpointing="auto")
    module.configure_model()
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_layerwise", logger=False)
    config = {"model": {"model_name_or_path": str(tmp_path)}, "data": {}, "trainer": {"devices": "auto"}}
    AutoGradientCheckpointing(config).on_fit_start(module.trainer, module)
    assert budgets == [MEMORY_FRACTION * (1000 // 2 + sum(p.nbytes for p in module.parameters()))]
    assert count_checkpointed(module.language_model) == 3


def test_memory_is_predicted_for_the_device_that_the_run_has_got(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = {
        "model": {"model_name_or_path": str(tmp_path)},
        "data": {},
        "trainer": {"accelerator": "auto", "devices": "auto"},
    }
    module = CausalLMModule(str(tmp_path))
    module.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_layerwise", logger=False)
    settings = settings_of_run(config, module)
    assert (settings.on_gpu, settings.devices) == (False, 2)
