"""Chains of resumes, of which each ends as the run that went through: the same weights, and the same curves."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from ows_lightning import CausalLMModule, GaLoreAdamW, InstructionDataModule, LayerwiseSampling, OWSTrainer
from ows_lightning.callbacks.resume import ContinueMetricsCSV
from ows_lightning.callbacks.save_on_signal import SaveOnSignal
from ows_lightning.errors import RunError
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import run
from tests.tiny import tiny_model

OF_THE_MACHINE = ("time_s", "tokens_per_second", "peak_memory_mb", "renewal_s", "drawing_s", "scoring_s")
STEPS = 20  # four epochs of five
Rows = list[dict[str, str]]

SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # The Trainer's, the checkpoint callback's and the data's settings.
    "epochs": ({"max_epochs": 4}, {}, {}),
    "steps": ({"max_steps": STEPS}, {}, {}),
    "validated in epochs": ({"max_epochs": 4, "val_check_interval": 2}, {}, {}),
    "validated over epochs": ({"max_steps": STEPS, "val_check_interval": 3, "check_val_every_n_epoch": None}, {}, {}),
    "saved after validations": (
        {"max_epochs": 4, "val_check_interval": 1},
        {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False},
        {},
    ),
    "accumulated by a schedule": ({"max_epochs": 4, "val_check_interval": 3}, {}, {"batch_size": 4}),
    "accumulated": ({"max_epochs": 4, "accumulate_grad_batches": 2, "val_check_interval": 3}, {}, {"batch_size": 4}),
    "saved within steps": (
        {"max_epochs": 4, "accumulate_grad_batches": 2, "val_check_interval": 3},
        {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"batch_size": 4},
    ),
    "a stream": ({"max_steps": STEPS, "val_check_interval": 3, "check_val_every_n_epoch": None}, {}, {"streaming": True}),
}


class Terminated(Callback):
    """Sends SIGTERM to its own process at the start of some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class FailsAt(Callback):
    """Fails in the middle of one batch, counted over all epochs."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.left == 0:
            raise ZeroDivisionError
        self.left -= 1


class Seen(Callback):
    """Notes the rows of each epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rows = self.rows.setdefault(trainer.current_epoch, [])
        rows += [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


class Runs:
    """Runs of one scenario in a folder, each under a name.

    Args:
        folder: With a model and rows, see `home`.
        scenario: One of ``SCENARIOS``.
        devices: Processes.
    """

    def __init__(self, folder: Path, scenario: str, devices: int = 1) -> None:
        self.folder, self.devices = folder, devices
        self.trainer, self.checkpoint, self.data = SCENARIOS[scenario]
        self.seen = Seen()
        # Beside those of `fit`.
        self.callbacks: list[Callback] = [GradientAccumulationScheduler({0: 1, 1: 2})] if "by a schedule" in scenario else []

    def fit(self, name: str, ckpt_path: Path | None = None, ended_in: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], Rows]:
        """Trains, from a checkpoint if it is given; returns the weights and what was logged."""
        torch.manual_seed(0)
        module = CausalLMModule(
            str(self.folder / "model"), rank=4, update_proj_gap=3, optimizer=lambda groups: GaLoreAdamW(groups, lr=1e-3)
        )
        data = {"batch_size": 8, "val_size": 6, **self.data}
        data["batch_size"] //= self.devices
        saves = {"every_n_train_steps": 1, "save_top_k": -1, **self.checkpoint}
        sampling = LayerwiseSampling(activated_layers=1, interval_steps=3, distribution="uniform")
        trainer = OWSTrainer(
            default_root_dir=self.folder / name,
            logger=CSVLogger(self.folder / name, name="", version=0, flush_logs_every_n_steps=1),
            callbacks=[SaveOnSignal(), sampling, ContinueMetricsCSV(), LearningRateMonitor("step"), Terminated(ended_in),
                       self.seen, ModelCheckpoint(**saves), *self.callbacks],
            accelerator="cpu", devices=self.devices, strategy="auto" if self.devices == 1 else "ddp_layerwise",
            log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            **self.trainer,
        )  # fmt: skip
        trainer.fit(module, InstructionDataModule(str(self.folder / "rows.jsonl"), **data), ckpt_path=ckpt_path)
        trainer.strategy.barrier()  # every process reads the curves, which the first one writes
        weights = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
        return weights, self.curves(name)

    def curves(self, name: str) -> Rows:
        with (self.folder / name / "version_0" / "metrics.csv").open() as file:
            return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in csv.DictReader(file)]

    def saved(self, name: str, step: int) -> Path | None:
        """The checkpoint of a step."""
        return next((self.folder / name / "version_0" / "checkpoints").glob(f"*step={step}.ckpt"), None)


def check_chains(runs: Runs, chains: list[tuple[int, ...]]) -> None:
    """Asserts that each chain of resumes, by the steps of the checkpoints, ends as the run that went through."""
    through = runs.fit("through")
    for number, chain in enumerate(chains):
        before, end = "through", through
        for position, step in enumerate(chain):
            name = f"chain{number}-{position}"
            if (saved := runs.saved(before, step)) is not None:  # not every scenario saves every step
                before, end = name, runs.fit(name, saved)
        assert [key for key in end[0] if not torch.equal(end[0][key], through[0][key])] == [], chain
        assert end[1] == through[1], chain


def chains_of(steps: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Chains of one to four resumes at random steps."""
    draw = random.Random(seed)
    return [tuple(sorted(draw.sample(range(1, steps + 1), draw.randint(1, 4)))) for _ in range(count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("chains")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"is {i} even?", "output": "yes" if i % 2 else "no"} for i in range(46)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs_of(home: Path, tmp_path: Path) -> Callable[[str], Runs]:
    def make(scenario: str) -> Runs:
        shutil.copytree(home, tmp_path, dirs_exist_ok=True)
        return Runs(tmp_path, scenario)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_chain_of_resumes_equals_a_run_that_went_through(scenario: str, runs_of: Callable[[str], Runs]) -> None:
    """A resume after the first step, within an epoch, and at epochs' ends, the last one too; many more by hand."""
    chains: list[tuple[int, ...]] = [(1, 8, 10, 20)]
    if "OWS_TEST_SEED" in os.environ:
        chains += [(step,) for step in range(1, STEPS + 1)] + chains_of(STEPS, 8, int(os.environ["OWS_TEST_SEED"]))
    check_chains(runs_of(scenario), chains)


@pytest.mark.parametrize("scenario", ["epochs", pytest.param("accumulated", marks=pytest.mark.slow)])
def test_terminated_in_the_last_step_of_each_epoch(scenario: str, runs_of: Callable[[str], Runs]) -> None:
    runs = runs_of(scenario)
    through = runs.fit("through")
    saved: Path | None = None
    for end in (5, 10, 15):
        with pytest.raises(RunError, match=f"stopped by SIGTERM after step {end}"):
            runs.fit(f"until-{end}", saved, ended_in=(end,))
        saved = runs.folder / f"until-{end}" / "version_0" / "checkpoints" / f"interrupted-step={end}.ckpt"
    weights, curves = runs.fit("last", saved)
    assert all(torch.equal(weights[name], through[0][name]) for name in weights)
    assert curves == through[1]


@pytest.mark.parametrize("scenario", [pytest.param("epochs", marks=pytest.mark.slow), "accumulated"])
def test_what_lightning_saves_at_an_exception_within_a_step_is_resumed_behind_the_last_one(
    scenario: str, runs_of: Callable[[str], Runs]
) -> None:
    runs = runs_of(scenario)
    through = runs.fit("through")
    runs.callbacks = [OnExceptionCheckpoint(runs.folder), FailsAt(7)]
    with pytest.raises(ZeroDivisionError):
        runs.fit("until")
    runs.callbacks = []
    weights, curves = runs.fit("resumed", runs.folder / "on_exception.ckpt")
    assert all(torch.equal(weights[name], through[0][name]) for name in weights)
    assert curves == through[1]


@pytest.mark.parametrize(("step", "batch_size"), [(7, 4), (7, 5), (5, 16), (10, 4)])
def test_a_resume_with_other_batches_ends_its_epoch_with_the_same_rows(
    step: int, batch_size: int, runs_of: Callable[[str], Runs], caplog: pytest.LogCaptureFixture
) -> None:
    runs = runs_of("epochs")
    runs.fit("through")
    through = runs.seen.rows
    runs.data = {"batch_size": batch_size}
    with caplog.at_level("INFO"):
        runs.fit("resumed", runs.saved("through", step))
    epoch, done = divmod(step, 5)
    assert runs.seen.rows == {**{e: through[e] for e in range(epoch + 1, 4)}, epoch: through[epoch][done * 8 :]}
    batches, before = -(-40 // batch_size), -(-40 // batch_size) - -(-(40 - 8 * (done or 5)) // batch_size)
    assert f"The resumed run has other batches: {before} of {batches} of this epoch count as done" in caplog.messages


def test_a_resume_with_other_rows_says_so(runs_of: Callable[[str], Runs]) -> None:
    runs = runs_of("epochs")
    runs.fit("through")
    runs.data = {"seed": 1, "val_size": 7}
    with pytest.warns(
        UserWarning, match=r"rows are others, or in another order \(rows from 40 to 39, seed from 0 to 1, other"
    ):
        runs.fit("resumed", runs.saved("through", 7))


def test_a_resume_with_as_many_other_rows_says_so(runs_of: Callable[[str], Runs]) -> None:
    runs = runs_of("epochs")
    runs.fit("through")
    rows = (runs.folder / "rows.jsonl").read_text().splitlines()
    (runs.folder / "rows.jsonl").write_text("\n".join(reversed(rows)))
    with pytest.warns(UserWarning, match=r"rows are others, or in another order \(other lengths\)"):
        runs.fit("resumed", runs.saved("through", 7))


def _in_this_process(arguments: list[str]) -> None:
    folder, scenario, chains = arguments
    check_chains(Runs(Path(folder), scenario, devices=2), [tuple(chain) for chain in json.loads(chains)])


@pytest.mark.slow
def test_two_processes(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    chains = json.dumps([(4, 6, 10, 20)])
    run([str(tmp_path), "accumulated", chains], tmp_path / "output", ranks=2, target=_in_this_process)


def _rows_seen(arguments: list[str]) -> None:
    """Trains with so many processes, from a checkpoint if one is given; each process writes down the rows that it saw."""
    folder, scenario, devices, name, *ckpt_path = arguments
    runs = Runs(Path(folder), scenario, devices=int(devices))
    weights, _ = runs.fit(name, *map(Path, ckpt_path))
    rank = os.environ.get("RANK", "0")
    (runs.folder / f"{name}-{rank}.json").write_text(json.dumps(runs.seen.rows))
    torch.save(weights, runs.folder / f"{name}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["accumulated", "a stream"])
def test_the_number_of_processes_changes_in_mid_epoch(scenario: str, home: Path, tmp_path: Path) -> None:
    """From one to two and back: in all, each epoch has the same rows, and the run ends with about the same weights."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    runs = Runs(tmp_path, scenario)

    def fit(name: str, devices: int, *ckpt_path: str) -> dict[str, list[str]]:
        words = [str(tmp_path), scenario, str(devices), name, *ckpt_path]
        said = run(words, tmp_path / f"{name}-output", ranks=devices, target=_rows_seen)
        assert "another order" not in said
        ranks = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(devices)]
        return {epoch: sorted(str(row) for rows in ranks for row in rows.get(epoch, ())) for epoch in ranks[0]}

    through = fit("through", 1)
    second = fit("second", 2, str(runs.saved("through", 7)))
    third = fit("third", 1, str(runs.saved("second", 13)))
    for epoch in second.keys() - {min(second)}:
        assert second[epoch] == through[epoch]
    for epoch in third.keys() - {min(third)}:
        assert third[epoch] == through[epoch]
    for rows, steps_left in ((second, 13), (third, 7)):
        assert len([row for epoch in rows.values() for row in epoch]) == 8 * steps_left
        assert Counter(rows[min(rows)]) <= Counter(through[min(rows)])
    before, after = (torch.load(tmp_path / f"{name}.pt") for name in ("through", "third"))
    for name, weight in before.items():
        assert (after[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_other_groups_are_reported(runs_of: Callable[[str], Runs]) -> None:
    runs = runs_of("epochs")
    runs.fit("through")
    runs.data = {"group_by_length": True}
    with pytest.warns(UserWarning, match=r"in another order \(group_size from 0 to 8\)"):
        runs.fit("resumed", runs.saved("through", 7))
