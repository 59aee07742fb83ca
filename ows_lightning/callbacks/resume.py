"""Resuming a run exactly, with the options that are configured now, and with the same rows in ``metrics.csv``."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.checkpoints.fixed_settings import plain
from ows_lightning.checkpoints.loops import resume_exactly
from ows_lightning.compat import mark_step_saved
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError
from ows_lightning.fit.duration import accumulation_scheduler
from ows_lightning.module import CausalLMModule
from ows_lightning.report.tables import write_csv
from ows_lightning.sampling.callback import LayerwiseSampling

CHANGEABLE = {  # settings of which a change is logged: a resumed run may have others, and then continues differently
    "trainer": ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
                "precision"),
    "model": ("lr_scheduler_type", "warmup_steps", "frozen_dtype"),
    "data": ("dataset", "eval_dataset", "split", "val_size", "data_format", "columns", "seed", "batch_size", "group_by_length",
             "max_seq_length", "train_on_prompt", "last_turn_only", "packing"),
    "sampling": ("seed", "scores", "threshold", "calibration_samples", "rescore_every"),
}  # fmt: skip


class Resume(Callback):
    """Lets a run continue exactly after the checkpoint's step, with the options and number of steps that are configured now.

    Lightning alone would take the options from the checkpoint; changes are logged. And no ModelCheckpoint saves the resumed
    step again: it would do so after the first micro-batch, whose gradient is in no checkpoint: the next resume would miss it.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of all optimizers' groups, as configured
        self._saved_options: list[dict[str, Any]] | None = None  # as configured in the run that is resumed
        self._saved_settings: dict[str, Any] = {}
        self._num_groups: list[int] = []  # of each optimizer, as configured
        self._resumed_at: int | None = None  # the step, until the next one begins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Resume.__init__(self)
        if stage == "fit":
            resume_exactly(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the configured options before the checkpoint, which must be of the same optimizers, overwrites them."""
        self._check_optimizers(trainer, pl_module)
        not_options = ("params", "param_names", "lr", "initial_lr")
        self._num_groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        for group in self._configured_groups(trainer):
            options = {name: value for name, value in group.items() if name not in not_options}
            self._options.append({**options, "lr": group.get("initial_lr", group["lr"])})

    def _check_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = changeable_settings(trainer, pl_module)["model.optimizer"]  # "" before they are made
        before = self._saved_settings.get("model.optimizer", now)
        if isinstance(pl_module, CausalLMModule) and now not in ("", before):
            raise UsageError(f"model.optimizer: the checkpoint is of {before}, this run of {now}; set it back, or start anew")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        self._resumed_at = trainer.global_step
        changed = self._apply_options(trainer)
        for key, now in changeable_settings(trainer, pl_module).items():
            if (before := self._saved_settings.get(key, now)) != now:
                scoring = key in ("sampling.scores", "sampling.threshold", "sampling.calibration_samples")
                changed[key] = f"{key} from {before} to {now}" + (" (not for the scores it has)" if scoring else "")
        if changed:
            rank_zero_info("The resumed run changes " + ", ".join(changed.values()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Marks the resumed step as saved, only now: a validation that was caught up on could still save it as the best."""
        if self._resumed_at == trainer.global_step:
            for callback in trainer.checkpoint_callbacks:
                # a RunCheckpoint saves at steps' ends by itself
                if isinstance(callback, ModelCheckpoint) and not isinstance(callback, RunCheckpoint):
                    mark_step_saved(callback, trainer.global_step)
        self._resumed_at = None

    def _apply_options(self, trainer: Trainer) -> dict[str, str]:
        changed = {}
        before = self._saved_options or [{}] * len(self._options)
        recomputed = all(isinstance(config.scheduler, LambdaLR) for config in trainer.lr_scheduler_configs)
        for group, configured, formerly in zip(self._configured_groups(trainer), self._options, before, strict=True):
            for key, value in configured.items():
                place = "initial_lr" if key == "lr" and "initial_lr" in group else key
                # Not where a schedule may have changed it since (ReduceLROnPlateau the rate, OneCycleLR the betas).
                if (key in formerly and formerly[key] == value) or (saved := group.get(place)) == value:
                    continue
                if key in ("rank", "proj_type") and "proj_type" in group:  # GaLoreAdamW's state has the checkpoint's shapes
                    raise UsageError(f"optimizer: {key} {saved} in the checkpoint, {value} now; set it back, or start anew")
                if place == "initial_lr" and not recomputed:
                    rank_zero_warn(f"The resumed run keeps lr {saved}, instead of {value}: its schedule is the checkpoint's")
                else:
                    changed[key] = f"{key} from {saved} to {value}"
                    group[place] = value
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR):  # its rates follow from the base rates, the step and the number of steps
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
                for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                    group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        return changed

    def _configured_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        """The groups without those that were added in training."""
        held = zip(trainer.optimizers, self._num_groups, strict=True)
        return [group for optimizer, number in held for group in optimizer.param_groups[:number]]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["changeable_settings"] = changeable_settings(trainer, pl_module)
        checkpoint["configured_options"] = self._options

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_settings = checkpoint.get("changeable_settings", {})
        self._saved_options = checkpoint.get("configured_options")
        self._check_optimizers(trainer, pl_module)  # fsdp2 made them, and began to fit, before


def changeable_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Returns the settings of ``CHANGEABLE`` that a run has, by their YAML keys."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    owners = {"trainer": trainer, "model": module.hparams, "sampling": LayerwiseSampling.of(trainer)}
    owners["data"] = data if isinstance(data, InstructionDataModule) else None  # others mean something else by these names
    settings = ((f"{part}.{name}", owners[part], name) for part, names in CHANGEABLE.items() for name in names)
    found = {key: plain(getattr(owner, name)) for key, owner, name in settings if hasattr(owner, name)}
    if accumulation_scheduler(trainer) is not None:
        del found["trainer.accumulate_grad_batches"]  # the scheduler changes it
    return {**found, "model.optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)}


class ContinueMetricsCSV(Callback):
    """Copies the rows that were logged up to the checkpoint into ``metrics.csv`` and ``generations.csv`` of a resumed run.

    A run can be killed between saving a step's checkpoint and logging its row, so the checkpoint holds that row, too.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        folder = run_folder(trainer)  # asks all ranks
        for logger in trainer.loggers:
            logger.save()  # rows that a CSVLogger of the user's still holds
        file = folder / "metrics.csv"
        logged = max(file.read_bytes().count(b"\n") - 1, 0) if file.is_file() else 0
        checkpoint["curves"] = {"folder": str(folder), "logged": logged, "row": _unlogged_row(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path and logger is not None and trainer.is_global_zero:
            _copy_rows(Path(trainer.ckpt_path), logger, checkpoint)


def _unlogged_row(trainer: Trainer) -> dict[str, Any] | None:
    """Returns the row that Lightning will log for this step after its callbacks have run; None if it is logged already."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    if batches.completed == batches.processed or loop._should_accumulate() or not connector.should_update_logs:
        return None
    row = convert_tensors_to_scalars(connector.metrics["log"])
    return {**row, "epoch": trainer.current_epoch, "step": loop._batches_that_stepped}


def _copy_rows(path: Path, logger: CSVLogger, checkpoint: Mapping[str, Any]) -> None:
    """Writes the rows up to a checkpoint into the ``metrics.csv`` of the run that resumes it and logs the later ones again."""
    if (saved := checkpoint.get("curves")) is None:  # it was saved without this callback
        return
    before = next((f for f in (path.parent.parent, Path(saved["folder"])) if (f / "metrics.csv").is_file()), None)
    now = Path(logger.log_dir)
    if before is None:
        return

    def rows_of(name: str) -> list[dict[str, Any]]:  # the resumed run repeats a step that was not complete
        with (before / name).open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["step"] and int(float(row["step"])) < checkpoint["global_step"]]

    rows = rows_of("metrics.csv")[: saved["logged"]] + ([saved["row"]] if saved["row"] else [])
    now.mkdir(parents=True, exist_ok=True)
    columns = sorted({key for row in rows for key in row})
    logger.experiment.metrics_keys = columns  # the experiment removes a file that is there
    write_csv({name: [row.get(name) for row in rows] for name in columns}, now / "metrics.csv")
    if (before / "generations.csv").is_file() and (answers := rows_of("generations.csv")):
        write_csv({name: [row[name] for row in answers] for name in answers[0]}, now / "generations.csv")
