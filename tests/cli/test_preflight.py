"""Numbers that are none, or out of range, end a run before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, LayerwiseSampling, OWSTrainer
from ows_lightning.callbacks.throughput import LearningRates
from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.cli.main import main
from ows_lightning.cli.preflight import LOGGED_METRICS, check_plan, check_run, iter_numbers
from ows_lightning.errors import UsageError
from tests.data.samples import tiny_tokenizer
from tests.models.architectures import tiny_config
from tests.tiny import tiny_batch, tiny_model

GIVEN = [
    "fit", "--model.model_name_or_path=nothing", "--data.dataset=nothing.jsonl", "--sampling.threshold=13.0",
    "--trainer.max_steps=1", "--model.optimizer=GaLoreAdamW", "--trainer.accelerator=cpu",
]  # fmt: skip


class ParsingCLI(OWSCLI):
    """Parses, and does nothing more."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a fit that has to be refused, and returns its line."""
    with pytest.raises(SystemExit) as exit:
        main([*GIVEN, *arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2, line
    return line.removeprefix("error: ")


def test_no_number_is_infinite_or_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key that has a number by default, and those whose default is null; of each, what no arithmetic survives."""
    config = ParsingCLI(GIVEN).config.fit
    keys = {key for key, value in iter_numbers(config) if isinstance(value, float)}
    keys |= {"trainer.gradient_clip_val", "model.optimizer.lr", "trainer.limit_train_batches", "trainer.overfit_batches"}
    assert {"model.optimizer.eps", "model.warmup_steps", "model.scale", "data.val_size", "sampling.threshold"} <= keys
    wrong = []
    values = [".inf", "-.inf", ".nan"]
    for number, key in enumerate(sorted(keys - {"model.optimizer.betas"})):
        for value in values if key == "model.scale" else values[number % 3 : number % 3 + 1]:
            line = refused(capsys, f"--{key}={value}")
            wrong += [] if line.startswith(f"{key}: ") else [(key, value, line)]
    assert not wrong


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--model.optimizer.betas=[0.9,.nan]"], "model.optimizer.betas"),
        (["--model.optimizer.betas=[0.9,1.0]"], "model.optimizer: betas"),
        (["--model.optimizer.betas=[0.9,0.99,0.999]"], "model.optimizer.betas"),
        (["--model.optimizer.lr=0"], "model.optimizer.lr"),
        (["--model.optimizer.lr=-1"], "model.optimizer.lr"),
        (["--model.optimizer.weight_decay=-0.1"], "model.optimizer: weight_decay"),
        (["--model.optimizer.eps=-1e-8"], "model.optimizer: eps"),
        (["--seed_everything=99999999999999999999999"], "seed_everything"),
        (["--data.seed=99999999999999999999999"], "data.seed"),
        (["--sampling.seed=-1"], "sampling.seed"),
        (["--sampling.seed=4294967296"], "sampling.seed"),
        (["--trainer.max_steps=99999999999999999999999"], "trainer.max_steps"),
        (["--trainer.max_epochs=-5"], "trainer: `max_epochs` must be a non-negative integer or -1"),
        (["--trainer.limit_val_batches=-1"], "trainer: You have passed invalid value -1"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val"),
        (["--checkpoint.every_n_train_steps=-1"], "Invalid value for every_n_train_steps=-1"),
        (["--model.optimizer=torch.optim.Adamm"], "model.optimizer"),
        (["--model.optimizer=torch.nn.Linear"], "model.optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_setting_out_of_range_is_named(arguments: Any, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *arguments).startswith(key)


def test_whatever_a_step_logs_can_be_monitored(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    trainer = OWSTrainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=LearningRates(),
    )  # fmt: skip
    trainer.fit(CausalLMModule(str(tmp_path), rank=4), DataLoader([tiny_batch()], batch_size=None))
    assert {name for name in trainer.callback_metrics if not name.startswith("lr-")} == {
        name for name in LOGGED_METRICS if not name.startswith("val_") and name not in ("epoch", "step")
    }


@pytest.mark.parametrize("kind", ["blt", "hrm_text"])
def test_blocks_are_counted_not_read_from_a_config(kind: str, tmp_path: Path) -> None:
    tiny_config(kind).save_pretrained(tmp_path)  # whose `num_hidden_layers` is missing, or means something else
    trainer = {"devices": 1, "strategy": "auto"}
    check_plan(CausalLMModule(str(tmp_path)), LayerwiseSampling(activated_layers=1, distribution=[1.0, 2.0]), trainer)
    with pytest.raises(UsageError, match="a list of 3 weights for 2 blocks"):
        check_plan(CausalLMModule(str(tmp_path)), LayerwiseSampling(distribution=[1.0, 2.0, 3.0]), trainer)


def test_a_rank_of_somebody_elses_module_is_no_projection() -> None:
    class Other(LightningModule):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = Trainer(strategy="ddp", devices=2, accelerator="cpu", logger=False)
    arguments = defaultdict(lambda: None, strategy="ddp")
    check_run("fit", Other(rank=3), LightningDataModule(), arguments, trainer)
    with pytest.raises(UsageError, match="write strategy: ddp_layerwise"):
        check_run("fit", CausalLMModule("nothing", rank=3), LightningDataModule(), arguments, trainer)
