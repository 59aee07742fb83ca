"""Ending a run whose gradients stay NaN or Inf."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from ows_lightning.callbacks.run_checkpoint import checkpoint_callback
from ows_lightning.callbacks.step_callback import StepCallback
from ows_lightning.checkpoints.find import last_good
from ows_lightning.errors import RunError
from ows_lightning.module import CausalLMModule


class StopOnNaN(StepCallback):
    """Ends a run after ``model.max_skipped_steps`` (10) skipped steps in a row; of other modules, GaLoreAdamW's count.

    The weights are still those of the last good step then. The error names the last checkpoint; without one, it is saved here.
    """

    _in_a_row = _skipped = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run, of which optimizers may be left."""
        super().on_train_start(trainer, pl_module)
        self._in_a_row, self._skipped = 0, _skipped_steps(trainer)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = pl_module.last_step_metrics if isinstance(pl_module, CausalLMModule) else None
        before, self._skipped = self._skipped, _skipped_steps(trainer)
        skipped = self._skipped > before if metrics is None else metrics.skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < pl_module.hparams.get("max_skipped_steps", 10):
            return
        folder = getattr(checkpoint_callback(trainer), "dirpath", None)
        good: Path | str | None = last_good(Path(folder)) if folder and trainer.is_global_zero else None
        if folder and (good := trainer.strategy.broadcast(good)) is None:
            good = f"{folder}/stopped-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(good)
        where = f"the last checkpoint is '{good}'" if good else "checkpoints are switched off"
        hint = f"{where}; lower the learning rate, or set trainer.gradient_clip_val"
        raise RunError(f"{self._in_a_row} steps in a row had NaN or Inf in the loss or a gradient and were skipped; {hint}")


def _skipped_steps(trainer: Trainer) -> int:
    return sum(getattr(optimizer, "skipped_steps", 0) for optimizer in trainer.optimizers)
