"""Resuming a run: loops continue exactly, changed options apply, and no checkpoint is saved twice."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.checkpoints.loops import resume_exactly
from ows_lightning.compat import mark_step_saved

RESUMABLE_TRAINER_ARGUMENTS = ("max_steps", "accumulate_grad_batches")
"""What of the Trainer's may change in a resumed run, which is said."""


class Resume(Callback):
    """Lets a run continue exactly after the checkpoint's step, with the options and number of steps that are configured now.

    Lightning alone would take the options from the checkpoint; what changes is said. And no ModelCheckpoint saves the step
    again at which the run is resumed: it would do so after the first micro-batch, of which a checkpoint keeps no gradients,
    and a run resumed from there would have missed it.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of all optimizers' groups
        self._options_before: list[dict[str, Any]] | None = None
        self._before: dict[str, int | None] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts afresh, and makes the Trainer's loops exact."""
        self._options, self._options_before, self._before = [], None, {}
        if stage == "fit":
            resume_exactly(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the options as they are configured: the checkpoint is read after this."""
        kept = ("params", "param_names", "lr", "initial_lr")
        self._options = [
            {**{k: v for k, v in group.items() if k not in kept}, "lr": group.get("initial_lr", group["lr"])}
            for group in _groups(trainer)
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies them where a run is resumed."""
        if trainer.ckpt_path is None:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                mark_step_saved(callback, trainer.global_step)
        changed = self._apply_options(trainer)
        for name, before in self._before.items():
            if before not in (None, now := getattr(trainer, name)):
                changed[name] = f"trainer.{name} from {before} to {now}"
        if changed:
            rank_zero_info("The resumed run changes " + ", ".join(changed.values()))

    def _apply_options(self, trainer: Trainer) -> dict[str, str]:
        changed = {}
        before = self._options_before or [{}] * len(self._options)
        for group, configured, formerly in zip(_groups(trainer), self._options, before, strict=True):
            for key, value in configured.items():
                place = "initial_lr" if key == "lr" and "initial_lr" in group else key
                if key in formerly and formerly[key] == value:
                    continue  # a schedule may have changed it since (ReduceLROnPlateau the rate, OneCycleLR the betas)
                if (saved := group.get(place)) != value:
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
        """Adds the numbers and the optimizers' options that are configured."""
        checkpoint.update({name: getattr(trainer, name) for name in RESUMABLE_TRAINER_ARGUMENTS})
        checkpoint["configured_options"] = self._options

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes over what they were."""
        self._before = {name: checkpoint.get(name) for name in RESUMABLE_TRAINER_ARGUMENTS}
        self._options_before = checkpoint.get("configured_options")


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
