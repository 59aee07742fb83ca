"""The run's folder belongs to one run, and to nobody when that has ended, however it did."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from ows_lightning.callbacks.auto_gradient_checkpointing import AutoGradientCheckpointing
from ows_lightning.callbacks.generations import ShowGenerations
from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.callbacks.run_folder import RunFolder, RunLogger
from ows_lightning.callbacks.run_summary import RunSummary
from ows_lightning.callbacks.self_checks import SelfChecks
from ows_lightning.errors import UsageError
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_batch, tiny_model


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Breaks(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise ValueError("a fault")


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, max_steps=2, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks], **{"logger": False, "enable_checkpointing": False, **settings},
    )  # fmt: skip


def batches() -> DataLoader:
    return DataLoader([tiny_batch()] * 2, batch_size=None)


def test_runs_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    (tmp_path / "version_0").write_text("")  # somebody else's, and no folder
    with ThreadPoolExecutor(16) as threads:
        versions = [*threads.map(lambda _: RunLogger(tmp_path, name="").version, range(16))]
    assert sorted(versions) == list(range(1, 17))


class NotTheFirst(SingleDeviceStrategy):
    """A process of a run that is not its first."""

    global_rank, is_global_zero = 1, False


def test_the_first_process_alone_writes_and_speaks(
    model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    caplog.set_level("INFO", "ows_lightning")
    runs = tmp_path / "runs"
    callbacks = [
        LayerwiseSampling(1, 1, "uniform"), RunFolder(), AutoGradientCheckpointing({}), SelfChecks(), RunSummary(),
        ShowGenerations(["What is 3?"]), RunCheckpoint(runs / "checkpoints", every_n_train_steps=1),
    ]  # fmt: skip
    others = trainer(
        runs, *callbacks, strategy=NotTheFirst("cpu"), logger=CSVLogger(runs, name="", version=0), enable_checkpointing=True
    )
    module = CausalLMModule(str(model_dir()), rank=4, gradient_checkpointing="auto", max_new_tokens=1)
    others.fit(module, batches(), batches())
    assert others.global_step == 2
    # The model is left to the first process of torch's group, of which there is none here.
    assert {path.relative_to(runs).parts[:2] for path in runs.rglob("*")} == {("version_0",), ("version_0", "model")}
    assert not [record.message for record in caplog.records if record.name.startswith("ows_lightning")]
    assert RunLogger(tmp_path / "more", name="").version == 0
    assert not (tmp_path / "more").exists()


def test_is_free_after_an_exception(tmp_path: Path) -> None:
    broken = trainer(tmp_path, RunFolder(), Breaks())
    with pytest.raises(ValueError, match="a fault"):
        broken.fit(Module(), batches())
    trainer(tmp_path, RunFolder()).fit(Module(), batches())
    assert broken.callbacks  # it lives, as in a notebook


class Interrupts(Callback):
    """As Ctrl-C in the second step, and in a validation; keeps what is said to it."""

    said: str | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise KeyboardInterrupt

    def on_validation_batch_start(self, *_: Any) -> None:
        raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.said = " ".join(getattr(exception, "__notes__", ()))


@pytest.mark.parametrize("saves", [False, True])
def test_an_interrupt_says_whether_the_run_can_go_on(saves: bool, tmp_path: Path) -> None:
    ends = Interrupts()
    saving = [ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)] if saves else []
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, RunFolder(), ends, *saving, enable_checkpointing=saves).fit(Module(), batches())
    assert ends.said == ("`--ckpt_path last` goes on from the newest checkpoint" if saves else "no checkpoint was saved yet")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, RunFolder(), ends).validate(Module(), batches(), verbose=False)
    assert ends.said == ""


def test_what_killed_runs_left_beside_a_run_is_cleared_away_and_a_living_ones_file_stays(tmp_path: Path) -> None:
    living, killed = (tmp_path / f"version_{number}" / "checkpoints" / ".last.ckpt.partial" for number in range(2))
    for file in (living, killed):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(1000))
    with FileLock(living.parents[1] / ".lock"):
        trainer(tmp_path, RunFolder(), logger=CSVLogger(tmp_path, name="")).fit(Module(), batches())
    assert living.exists()
    assert not killed.exists()


@pytest.mark.parametrize(("base", "message"), [("model", "is what the result is made from"), ("base", "no part of a model")])
def test_a_model_that_would_be_replaced_is_named_before_anything_trains(
    base: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is trained, and a folder that holds other files, where a run has no logger and so no folder of its own."""
    for folder in {base, "model"}:
        tiny_model("llama").save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    if base != "model":
        (tmp_path / "model" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    module = CausalLMModule(str(tmp_path / base), optimizer=torch.optim.AdamW, rank=None)
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, RunFolder()).fit(module, batches())
    assert module.last_step_metrics is None
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_the_sampling_callback_gets_its_own_folder_back(tmp_path: Path) -> None:
    sampling = LayerwiseSampling(1, 1, "uniform")
    trainer(tmp_path / "first", sampling, RunFolder()).fit(Module(), batches())
    first = (tmp_path / "first" / "sampling_history.csv").read_bytes()
    logger = CSVLogger(tmp_path / "second")
    trainer(tmp_path, sampling, logger=logger).fit(Module(), batches())
    assert (Path(logger.log_dir) / "sampling_history.csv").is_file()
    assert (tmp_path / "first" / "sampling_history.csv").read_bytes() == first


def test_a_summary_starts_afresh_with_each_fit(tmp_path: Path) -> None:
    summary, losses = RunSummary(), []
    for factor in (1.0, 3.0):
        module = Module()
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(factor)
        trainer(tmp_path, summary, num_sanity_val_steps=-1).fit(module, batches(), batches())
        losses.append(summary.before["val_loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("checked", "part"), [(-1, ""), (2, ""), (1, r" \(1 of 2 batches\)")])
def test_a_summary_says_which_rows_its_figures_from_before_are_of(
    checked: int, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ows_lightning")
    trainer(tmp_path, RunSummary(), num_sanity_val_steps=checked).fit(Module(), batches(), batches())
    before = re.search(rf"Before training{part}: validation loss (\d\.\d+)$", caplog.text, re.MULTILINE)
    assert before
    assert re.search(rf"After training: validation loss {before[1]}{part} -> \d\.\d+$", caplog.text, re.MULTILINE)


def test_a_summary_without_a_sanity_check_has_no_figures_from_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ows_lightning")
    trainer(tmp_path, RunSummary(), num_sanity_val_steps=0).fit(Module(), batches(), batches())
    assert "Before training" not in caplog.text
    assert re.search(r"After training: validation loss \d\.\d+$", caplog.text, re.MULTILINE)
