"""Numbers that are none, or out of range, end a run before anything is loaded."""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from ows_lightning import CausalLMModule, LayerwiseSampling, OWSTrainer
from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.callbacks.throughput import LearningRates
from ows_lightning.cli.lightning_cli import OWSCLI
from ows_lightning.cli.main import main
from ows_lightning.cli.preflight import LOGGED_METRICS, check_devices, check_plan, check_run, check_writable, iter_numbers
from ows_lightning.data import InstructionDataModule
from ows_lightning.distributed.fsdp2 import FSDP2Strategy
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


class Untyped(LightningModule):
    """A module of the user's own, one of whose parameters has no type."""

    def __init__(self, scale=1.0, learning_rate: float = 1e-3) -> None:  # type: ignore[no-untyped-def]
        super().__init__()


class Unscaled(CausalLMModule):
    """Takes no scale, too, unlike its parent."""

    def __init__(self, model_name_or_path: str, scale: Optional[float] = 1.0) -> None:  # noqa: UP045
        super().__init__(model_name_or_path)


class Undecided(CausalLMModule):
    def __init__(self, model_name_or_path: str, scale=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model_name_or_path)


def of_class(name: str, *more: str) -> list[str]:
    """A fit with a module of this file."""
    given = ["--model.model_name_or_path=nothing"] if name != "Untyped" else []
    return ["fit", f"--model=tests.cli.test_preflight.{name}", *given, "--data.dataset=nothing.jsonl", *more]


@pytest.mark.parametrize("name", ["Untyped", "Unscaled", "Undecided"])
def test_a_class_of_the_users_may_be_given_nothing_where_its_own_parameter_takes_that(name: str) -> None:
    assert ParsingCLI(of_class(name, "--model.scale=null")).config.fit.model.init_args.scale is None


def test_a_rate_of_0_is_refused_where_something_trains() -> None:
    with pytest.raises(UsageError, match=r"model.learning_rate: 0.0 must be above 0"):
        ParsingCLI(of_class("Untyped", "--model.learning_rate=0"))
    optimizer = "--model.optimizer=GaLoreAdamW", "--model.optimizer.lr=0"
    evaluation = ParsingCLI(["validate", "--model.model_name_or_path=nothing", "--data.dataset=nothing.jsonl", *optimizer])
    assert evaluation.config.validate.model.init_args.optimizer.init_args.lr == 0


def test_the_ends_of_a_range_are_in_it() -> None:
    ends = {
        "trainer.accumulate_grad_batches": 1, "trainer.gradient_clip_val": 0, "trainer.num_sanity_val_steps": -1,
        "data.seed": 0, "sampling.seed": 2**32 - 1, "seed_everything": 2**32 - 1,
    }  # fmt: skip
    config = ParsingCLI([*GIVEN, *(f"--{key}={value}" for key, value in ends.items())]).config.fit
    assert config.sampling.seed == config.seed_everything == 2**32 - 1


def test_a_number_in_a_list_is_looked_at_too() -> None:
    with pytest.raises(UsageError, match=r"^model.scale: nan is out of range"):
        ParsingCLI(of_class("Untyped", "--model.scale=[[1.0, 2.0], [.nan]]"))


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


def test_offloaded_blocks_need_sampling_where_something_trains(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    module, sampling = CausalLMModule(str(tmp_path), frozen_in="host"), LayerwiseSampling(2, distribution="uniform")
    check_plan(module, sampling, {"devices": 1, "strategy": "auto"})
    with pytest.raises(UsageError, match=r"^model.frozen_in: host needs frozen blocks"):
        check_plan(module, None, {"devices": 1, "strategy": "auto"})
    for strategy in ("fsdp2", FSDP2Strategy()):
        with pytest.raises(UsageError, match=r"^model.frozen_in: host is for one device, and trainer.strategy: fsdp2 is set"):
            check_plan(module, sampling, {"devices": 1, "strategy": strategy})
    alone, sampled = (Trainer(accelerator="cpu", devices=1, logger=False, callbacks=ours) for ours in ([], [sampling]))
    check_run("fit", module, LightningDataModule(), SETTINGS, sampled)
    check_run("validate", module, LightningDataModule(), SETTINGS, alone)
    with pytest.raises(UsageError, match=r"^model.frozen_in: host needs frozen blocks"):
        check_run("fit", module, LightningDataModule(), SETTINGS, alone)


@pytest.mark.parametrize("setting", [{"strategy": "ddp"}, {"strategy": DDPStrategy()}, {"precision": "16-mixed"}])
def test_a_plan_refuses_what_a_fit_would(setting: dict[str, Any], model_dir: Callable[..., Path]) -> None:
    """Projected gradients are enough for that, without sampling. A strategy may be given by its class."""
    module, full = CausalLMModule(str(model_dir())), CausalLMModule(str(model_dir()), rank=None, optimizer=torch.optim.AdamW)
    ((key, value),) = setting.items()
    with pytest.raises(UsageError, match=f"^trainer.{key}: {value if isinstance(value, str) else 'DDPStrategy'} "):
        check_plan(module, None, {"devices": 2, "strategy": "auto", **setting})
    check_plan(full, None, {"devices": 2, "strategy": "auto", **setting})


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


class Module(LightningModule):
    """Somebody else's."""


SETTINGS: dict[str, Any] = defaultdict(lambda: None, strategy="auto")


def test_one_process_alone_looks_at_what_others_may_have_begun_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path, name="", version=0)
    Path(logger.log_dir).mkdir()
    trainer = Trainer(accelerator="cpu", devices=1, logger=logger)
    run = "fit", Module(), InstructionDataModule("nothing.jsonl", tokenizer=tiny_tokenizer()), SETTINGS, trainer
    with pytest.raises(UsageError, match=r"data.dataset: .*nothing.jsonl"):
        check_run(*run)
    Path(logger.log_dir, "metrics.csv").touch()
    with pytest.raises(UsageError, match=r"trainer.logger.version: .* holds a run already"):
        check_run(*run)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    check_run(*run)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_reads_no_training_rows(command: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a?", "output": "b"}\n')
    rows = str(tmp_path / "rows.jsonl")
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    data = {"dataset": "nothing.jsonl", "eval_dataset": rows, "test_dataset": rows}
    check_run(command, Module(), InstructionDataModule(**data), SETTINGS, trainer)
    read = "eval_dataset" if command == "validate" else "test_dataset"
    with pytest.raises(UsageError, match=rf"^data.{read}: .*nothing.jsonl"):
        check_run(command, Module(), InstructionDataModule(**{**data, read: "nothing.jsonl"}), SETTINGS, trainer)


def test_a_module_of_the_users_has_callbacks_metrics_and_schedules_of_its_own(tmp_path: Path) -> None:
    """And a schedule of accumulation prevails over the Trainer's default."""
    callbacks = [
        StochasticWeightAveraging(swa_lrs=0.1), GradientAccumulationScheduler({0: 2}),
        RunCheckpoint(tmp_path, monitor="reward"),
    ]  # fmt: skip
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=callbacks)
    check_run("fit", Module(), LightningDataModule(), SETTINGS, trainer)


@pytest.mark.parametrize(
    ("monitor", "mode", "data"),
    [
        ("val_loss", "min", {"val_size": 0, "eval_dataset": "nothing.jsonl"}),
        ("val_perplexity", "min", {}),
        ("tokens_per_second", "max", {}),
        ("step", "max", {}),
        ("lr-GaLoreAdamW", "min", {}),
    ],
)
def test_what_is_logged_can_be_monitored(monitor: str, mode: str, data: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path, monitor=monitor, mode=mode)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[checkpoint])
    module, rows = CausalLMModule("./nothing/at/all"), InstructionDataModule("rows.jsonl", tokenizer=tiny_tokenizer(), **data)
    with pytest.raises(UsageError, match=r"^model.model_name_or_path: "):  # which is looked at when the others are good
        check_run("fit", module, rows, SETTINGS, trainer)


def test_a_few_processes_may_share_a_core() -> None:
    def check(devices: int) -> None:
        check_devices(Trainer(accelerator="cpu", devices=devices, strategy="ddp_layerwise", logger=False))

    most = 8 * (os.cpu_count() or 1)
    check(most)
    with pytest.raises(UsageError, match=rf"^trainer.devices: {most + 1} are more than the {most // 8} CPU cores"):
        check(most + 1)


@pytest.mark.parametrize(
    "launcher",
    [
        {"MASTER_ADDR": "first"},
        {
            "SLURM_JOB_NAME": "train", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        },
    ],
    ids=["by hand", "SLURM"],
)  # fmt: skip
def test_several_machines_find_each_other_by_a_variable_or_a_launcher(
    launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy="ddp_layerwise", logger=False)
    check_run("fit", Module(), LightningDataModule(), SETTINGS, trainer)


def test_a_folder_on_a_full_disk_can_not_be_written_to(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # in the place of a disk with so much room
    try:
        with pytest.raises(UsageError, match=r"^checkpoint.dirpath: can't write to .*File too large"):
            check_writable("checkpoint.dirpath", tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
