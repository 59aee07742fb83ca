"""The summary before a run: what it predicts, and that a prediction never stands in a run's way."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from ows_lightning.callbacks import auto_gradient_checkpointing, run_summary
from ows_lightning.callbacks.auto_gradient_checkpointing import AutoGradientCheckpointing
from ows_lightning.callbacks.run_summary import RunSummary
from ows_lightning.data import InstructionDataModule
from ows_lightning.memory.plan_settings import PlanSettings, settings_from_config
from ows_lightning.memory.prediction import MemoryPrediction
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model


class NeedsContents(GaLoreAdamW):
    """An optimizer that can't be followed with tensors that hold nothing."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise KeyError
        return super().step(closure)


def plain_trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, default_root_dir=root, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks], **settings,
    )  # fmt: skip


def test_a_prediction_is_for_the_devices_that_the_run_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = {
        "model": {"model_name_or_path": str(tmp_path), "optimizer": GaLoreAdamW, "gradient_checkpointing": "auto"},
        "data": {}, "trainer": {"devices": "auto", "strategy": "fsdp2"}, "sampling": None,
    }  # fmt: skip
    module = CausalLMModule(str(tmp_path), rank=4, gradient_checkpointing="auto")
    module.configure_model()
    strategy = SimpleNamespace(broadcast=lambda number: number)
    module._trainer = run = SimpleNamespace(world_size=2, num_devices=2, is_global_zero=True, strategy=strategy)
    found: list[PlanSettings] = []
    monkeypatch.setattr(run_summary, "predict_memory", lambda settings: found.append(settings) or 1 / 0)
    monkeypatch.setattr(auto_gradient_checkpointing, "fewest_checkpointed_blocks", lambda given, _: found.append(given) or 0)
    RunSummary(config)._memory_text(module)
    AutoGradientCheckpointing(config).on_fit_start(run, module)  # type: ignore[arg-type]
    assert [(settings.devices, settings.is_sharded) for settings in found] == [(2, True)] * 2


@pytest.mark.parametrize(
    ("scheduling", "limits"),
    [
        ({0: 4, 1: 1}, {"max_epochs": 2, "val_check_interval": 11, "check_val_every_n_epoch": None}),
        ({0: 1, 1: 4}, {"max_steps": 10, "val_check_interval": 11, "check_val_every_n_epoch": None}),
        ({0: 3}, {"max_steps": 3, "val_check_interval": 8}),
        ({0: 3}, {"max_steps": 2, "val_check_interval": 6}),
        ({0: 8}, {"max_epochs": 2, "check_val_every_n_epoch": 3}),
        ({0: 8, 1: 2}, {"max_steps": 4, "check_val_every_n_epoch": 2, "val_check_interval": 6}),
        ({0: 8, 1: 2}, {"max_steps": 3, "check_val_every_n_epoch": 2, "val_check_interval": 6}),
        ({0: 1}, {"max_epochs": 1, "check_val_every_n_epoch": 2, "val_check_interval": "01:00:00:00"}),
    ],
)
def test_a_validation_that_does_not_come_is_said_for_any_schedule_of_accumulation(
    scheduling: dict[int, int], limits: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), rank=4, lr_scheduler_type="constant", warmup_steps=0)
    summary = RunSummary()
    trainer = plain_trainer(tmp_path, summary, GradientAccumulationScheduler(scheduling), num_sanity_val_steps=1, **limits)
    rows = DataLoader([tiny_batch()] * 8, batch_size=None)
    trainer.fit(module, rows, rows)
    setting = "check_val_every_n_epoch" if (trainer.check_val_every_n_epoch or 1) > 1 else "val_check_interval"
    said = re.search(rf"No validation in these \d+ steps: lower trainer\.{setting}$", caplog.text, re.MULTILINE)
    assert bool(said) == (not summary.validated_step)  # 0: the sanity check's


def test_a_prediction_is_for_the_largest_accumulation_of_a_schedule(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    scheduler = {"class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler"}
    scheduler |= {"init_args": {"scheduling": {0: 2, 1: 8, 2: 4}}}  # type: ignore[dict-item]
    config: dict[str, Any] = {"model": {"model_name_or_path": str(tmp_path)}, "data": {}, "sampling": {}}
    found = [
        settings_from_config({**config, "trainer": trainer}).accumulate_grad_batches
        for trainer in (
            {"callbacks": [scheduler, {"class_path": "Timer"}]}, {"callbacks": scheduler},
            {"callbacks": [{"class_path": "Timer"}, {"class_path": "my.OwnGradientAccumulationScheduler"}],
             "accumulate_grad_batches": 3},
            {},
        )
    ]  # fmt: skip
    assert found == [8, 8, 3, 1]


class Adapters(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(tiny_model("llama"), lora)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


def test_what_the_user_froze_does_not_count_as_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    module = Adapters()
    all_of_them = sum(p.numel() for p in module.parameters() if p.requires_grad)
    sampling = LayerwiseSampling(2, interval_steps=1, distribution="uniform")
    trainer = plain_trainer(tmp_path, sampling, RunSummary(), max_steps=8)
    trainer.fit(module, DataLoader([tiny_batch()] * 8, batch_size=None))
    assert f"Over the run, 4 of 4 blocks train: {all_of_them / 1e3:.4g}K weights" in caplog.text


def test_blocks_that_train_are_not_said_to_be_at_rest() -> None:
    sampling = LayerwiseSampling(2, always_train=["norm"], resting_rank=4)
    text = run_summary._training_text(SimpleNamespace(callbacks=[sampling]), Adapters(), 8)  # type: ignore[arg-type]
    assert "at a time 2 blocks (others at rest, rank 4) + norm" in text


@pytest.mark.parametrize("model", ["itself", "another"])
def test_a_prediction_that_fails_is_a_line_and_the_run_goes_on(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    name = str(tmp_path) if model == "itself" else "no/such-model"
    config = {"model": {"model_name_or_path": name, "optimizer": NeedsContents}, "data": {}, "trainer": {}, "sampling": None}
    module = CausalLMModule(str(tmp_path), optimizer=NeedsContents, rank=4, lr_scheduler_type="constant", warmup_steps=0)
    trainer = plain_trainer(tmp_path, RunSummary(config), max_steps=1)
    trainer.fit(module, DataLoader([tiny_batch()], batch_size=None))
    assert trainer.global_step == 1
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("Memory")]
    assert "not predicted (" in line


def test_the_prediction_is_added_to_what_others_have_noted_on_an_error() -> None:
    error = torch.OutOfMemoryError()
    error.__notes__ = ["of another"]
    summary = RunSummary({})
    summary.predicted = "predicted"
    summary.on_exception(Trainer(accelerator="cpu", logger=False), CausalLMModule("any"), error)
    assert error.__notes__ == ["of another", "predicted"]


@pytest.mark.parametrize(("host_bytes", "fits"), [(0, True), (600, False)])
def test_a_run_that_does_not_fit_is_told_so(
    host_bytes: int, fits: bool, model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, what waits in host memory is in the same memory."""
    monkeypatch.setattr(run_summary, "available_bytes", lambda *_: 1000)
    monkeypatch.setattr(run_summary, "predict_memory", lambda _: MemoryPrediction({"weights": 500}, host_bytes))
    config = {"model": {"model_name_or_path": str(model_dir()), "optimizer": GaLoreAdamW}, "data": {}, "trainer": {}}
    module = CausalLMModule(str(model_dir()), rank=4)
    module.configure_model()
    module.trainer = plain_trainer(tmp_path)
    text = RunSummary({**config, "sampling": None})._memory_text(module)
    assert text.startswith("0.0 GB predicted for tensors, 0.0 GB available on cpu")
    assert ("; too little: see `" in text) is not fits


def test_a_long_prompt_is_shown_by_its_ends(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": f"first {'middle ' * 100}last", "output": "yes"}) + "\n")
    data = InstructionDataModule(str(file), val_size=0, tokenizer=tiny_tokenizer(), max_seq_length=2000)
    data.prepare_data()
    data.setup()
    row = run_summary._data_texts(data)["A row"]
    assert re.match(r"<\|im_start\|>user\\nfirst (middle )+.* \[\.\.\.\] .*(middle )+last<\|im_end\|>", row)
    assert len(row) < 600


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_steps": 0, "max_time": "00:01:00:00"}, "raise max_steps"),
        ({"max_epochs": 0}, "raise max_epochs"),
        ({"max_epochs": 0, "max_steps": 100}, "raise max_epochs"),
        ({"max_steps": 2, "max_time": "00:00:00:00"}, "raise max_time, which earlier runs have used up"),
    ],
)
def test_a_run_that_had_ended_says_which_limit_to_raise(
    limits: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain_trainer(tmp_path, RunSummary(), **limits)
    trainer.fit(Adapters(), DataLoader([tiny_batch()] * 2, batch_size=None))
    assert f"Nothing was trained: the checkpoint is of step 0 already; {said}" in caplog.text


def test_the_last_validation_need_not_be_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Validated(Adapters):
        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.model(**batch).loss)

    caplog.set_level(logging.INFO, "ows_lightning")
    rows = DataLoader([tiny_batch()] * 3, batch_size=None)
    trainer = plain_trainer(tmp_path, RunSummary(), max_steps=3, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(Validated(), rows, rows)
    assert "After step 2: validation loss" in caplog.text


def test_the_time_of_scores_draws_and_subspaces_is_a_share_of_the_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ows_lightning")
    trainer = plain_trainer(tmp_path, sampling := LayerwiseSampling())
    sampling.seconds = 2.0
    trainer.callback_metrics.update(time_s=torch.tensor(200.0), renewal_s=torch.tensor(3.0))
    RunSummary().on_train_end(trainer, Adapters())
    assert "Scores, draws and subspaces took 5.0 s of 200 s (2.5%)" in caplog.text
