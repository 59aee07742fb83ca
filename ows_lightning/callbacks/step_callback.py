"""A callback that acts when the optimizer has stepped."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """Calls ``on_step_end`` at the end of the batch in which the optimizer stepped."""

    _steps_seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting at the run's first step, which is not 0 in a resumed run."""
        super().on_train_start(trainer, pl_module)
        self._steps_seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer has stepped; ``trainer.global_step`` counts the step already."""
