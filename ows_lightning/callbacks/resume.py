"""Resuming: which settings a run has to keep, which may change, and how its curves go on."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import causal_lm, decoder_layers
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import architecture_of

log = logging.getLogger(__name__)

MODEL_KEYS = ("model_name_or_path", "rank", "proj_type", "project_embeddings", "lora")
SAMPLING_KEYS = ("activated_layers", "interval_steps", "distribution", "always_train")


def lasting_settings(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    """Returns the settings that a run keeps from its first step to its last, as plain values by their YAML keys."""
    settings: dict[str, Any] = {f"model.{key}": module.hparams[key] for key in MODEL_KEYS if key in module.hparams}
    settings["number of blocks"] = len(decoder_layers(module))
    settings |= architecture_of(getattr(causal_lm(module), "config", None))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LayerwiseSampling):
            settings |= {f"sampling.{key}": getattr(callback, key) for key in SAMPLING_KEYS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def check_settings(saved: Mapping[str, Any] | None, now: Mapping[str, Any], resumes: bool = True) -> None:
    """Refuses to resume a run with settings that it can't change, or to evaluate one model with another's weights.

    Args:
        saved: The ``lasting_settings`` in the checkpoint; None if it has none.
        now: Those of the run that loads it.
        resumes: Whether it goes on training; else the model's dimensions alone have to agree.

    Raises:
        UsageError: Names the keys that differ, with both values; or the checkpoint is none of such a run.
    """
    if saved is None:
        raise UsageError("ckpt_path: the checkpoint is of another program's run; give one that `main.py fit` wrote")
    keys = {key for key in saved.keys() | now.keys() if resumes or "." not in key}
    different = [key for key in keys if not _same(key, saved.get(key), now.get(key))]
    if different:
        listed = ", ".join(f"{key} ({saved.get(key)!r} in the checkpoint, {now.get(key)!r} now)" for key in sorted(different))
        raise UsageError(f"ckpt_path: the checkpoint is of a run with other settings: {listed}; set them back, or start anew")


def _same(key: str, saved: Any, now: Any) -> bool:
    if key == "model.model_name_or_path" and saved and now:
        return Path(saved).name == Path(now).name  # a directory may have been moved
    return bool(saved == now)


def save_no_step_again(trainer: Trainer) -> None:
    """Lets no ModelCheckpoint save the step at which the run is resumed.

    It would do so after the first micro-batch, of which a checkpoint keeps no gradients: a run resumed from there would have
    missed it.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step


def apply_changes(trainer: Trainer, options: Sequence[Mapping[str, Any]], max_steps: int | None) -> None:
    """Gives a resumed run's optimizer the options that are configured now, and logs what they change.

    Args:
        trainer: The trainer, with optimizers and schedules as the checkpoint had them.
        options: For every parameter group the options that it was built with.
        max_steps: The number of steps that was configured before, if it is known.
    """
    changed = {}
    for group, configured in zip(trainer.optimizers[0].param_groups, options, strict=True):
        for key, value in configured.items():
            place = "initial_lr" if key == "lr" and "initial_lr" in group else key
            if (before := group.get(place)) != value:
                changed[key] = f"{key} from {before} to {value}"
                group[place] = value
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, LambdaLR):  # its rates follow from the base rates, the step and the number of steps
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
    if max_steps not in (None, trainer.max_steps):
        changed["max_steps"] = f"trainer.max_steps from {max_steps} to {trainer.max_steps}"
    if changed:
        rank_zero_info("The resumed run changes " + ", ".join(changed.values()))


def continue_curves(trainer: Trainer) -> None:
    """Puts what the resumed run logged before the checkpoint into this run's folder, on rank 0."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    if trainer.ckpt_path is None or logger is None or not trainer.is_global_zero:
        return
    before, now = Path(trainer.ckpt_path).parent.parent, Path(logger.log_dir)
    if before.resolve() == now.resolve() or not (before / "metrics.csv").is_file():
        return
    now.mkdir(parents=True, exist_ok=True)
    if (before / "outlier_scores.json").is_file() and not (now / "outlier_scores.json").exists():
        shutil.copy(before / "outlier_scores.json", now)
    with (before / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row.get("step") and int(float(row["step"])) < trainer.global_step]
        columns = list(reader.fieldnames or [])
    with (now / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    logger.experiment.metrics_keys = columns
