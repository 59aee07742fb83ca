"""Resuming a run exactly, with the options that are configured now."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.checkpoints.loops import resume_exactly
from ows_lightning.compat import mark_step_saved

RESUMABLE_TRAINER_ARGUMENTS = ("max_steps", "accumulate_grad_batches")
"""Arguments of the Trainer that a resumed run may change; a change is logged."""


class Resume(Callback):
    """Lets a run continue exactly after the checkpoint's step, with the options and number of steps that are configured now.

    Lightning alone would take the options from the checkpoint; changes are logged. And no ModelCheckpoint saves the step
    again at which the run is resumed: it would do so after the first micro-batch, of which a checkpoint keeps no gradients,
    and a run resumed from there would have missed it.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of all optimizers' groups, as configured
        self._saved_options: list[dict[str, Any]] | None = None  # as configured in the run that is resumed
        self._saved_arguments: dict[str, int | None] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run, and makes the Trainer's loops exact."""
        Resume.__init__(self)
        if stage == "fit":
            resume_exactly(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the configured options before the checkpoint overwrites them."""
        kept = ("params", "param_names", "lr", "initial_lr")
        for group in _groups(trainer):
            options = {name: value for name, value in group.items() if name not in kept}
            self._options.append({**options, "lr": group.get("initial_lr", group["lr"])})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies them to a resumed run, and logs what changed."""
        if trainer.ckpt_path is None:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                mark_step_saved(callback, trainer.global_step)
        changed = self._apply_options(trainer)
        for name, before in self._saved_arguments.items():
            if before not in (None, now := getattr(trainer, name)):
                changed[name] = f"trainer.{name} from {before} to {now}"
        if changed:
            rank_zero_info("The resumed run changes " + ", ".join(changed.values()))

    def _apply_options(self, trainer: Trainer) -> dict[str, str]:
        changed = {}
        before = self._saved_options or [{}] * len(self._options)
        for group, configured, formerly in zip(_groups(trainer), self._options, before, strict=True):
            for key, value in configured.items():
                place = "initial_lr" if key == "lr" and "initial_lr" in group else key
                # Not where a schedule may have changed it since (ReduceLROnPlateau the rate, OneCycleLR the betas).
                same = key in formerly and formerly[key] == value
                if not same and (saved := group.get(place)) != value:
                    changed[key] = f"{key} from {saved} to {value}"
                    group[place] = value
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR):  # its rates follow from the base rates, the step and the number of steps
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
                for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                    group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        return changed

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the configured options and Trainer arguments."""
        checkpoint.update({name: getattr(trainer, name) for name in RESUMABLE_TRAINER_ARGUMENTS})
        checkpoint["configured_options"] = self._options

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads those of the run that is resumed."""
        self._saved_arguments = {name: checkpoint.get(name) for name in RESUMABLE_TRAINER_ARGUMENTS}
        self._saved_options = checkpoint.get("configured_options")


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
