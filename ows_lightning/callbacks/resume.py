"""Resuming a run exactly, with the options that are configured now."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.checkpoints.fixed_settings import plain
from ows_lightning.checkpoints.loops import resume_exactly
from ows_lightning.compat import mark_step_saved
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError
from ows_lightning.fit.duration import accumulation_scheduler
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling

CHANGEABLE = {  # settings of which a change is logged: a resumed run may have others, and then continues differently
    "trainer": (
        "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision"
    ),
    "model": ("lr_scheduler_type", "warmup_steps"),
    "data": (
        "dataset", "eval_dataset", "split", "val_size", "data_format", "columns", "seed", "batch_size",
        "group_by_length", "max_seq_length", "train_on_prompt", "last_turn_only", "packing",
    ),
    "sampling": ("seed", "scores", "threshold", "calibration_samples", "rescore_every"),
}  # fmt: skip


class Resume(Callback):
    """Lets a run continue exactly after the checkpoint's step, with the options and number of steps that are configured now.

    Lightning alone would take the options from the checkpoint; changes are logged. And no ModelCheckpoint saves the resumed
    step again: it would do so after the first micro-batch, whose gradient is in no checkpoint, so that a run resumed from
    there would miss it.
    """

    def __init__(self) -> None:
        self._options: list[dict[str, Any]] = []  # of all optimizers' groups, as configured
        self._saved_options: list[dict[str, Any]] | None = None  # as configured in the run that is resumed
        self._saved_settings: dict[str, Any] = {}
        self._num_groups: list[int] = []  # of each optimizer, as configured
        self._resumed_at: int | None = None  # the step, until the next one begins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run, and makes the Trainer's loops exact."""
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
        """Applies the configured options to a resumed run, and logs what changed."""
        if trainer.ckpt_path is None:
            return
        self._resumed_at = trainer.global_step
        changed = self._apply_options(trainer)
        for key, now in changeable_settings(trainer, pl_module).items():
            if (before := self._saved_settings.get(key, now)) != now:
                changed[key] = f"{key} from {before} to {now}"
        if changed:
            rank_zero_info("The resumed run changes " + ", ".join(changed.values()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Marks the resumed step as saved: until now, a validation that is made up for could save it as the best."""
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
        """Saves the configured options and settings."""
        checkpoint["changeable_settings"] = changeable_settings(trainer, pl_module)
        checkpoint["configured_options"] = self._options

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reads the options and settings of the run that is resumed."""
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
