"""What is left behind when a fit has ended: gradients that any code may use."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning.optim.galore import GaLoreAdamW


class LeaveGradients(Callback):
    """Leaves gradients to ``grad`` again when a fit has ended, also by an exception: any code may train the weights then."""

    @classmethod
    def is_in(cls, trainer: Trainer) -> bool:
        """Whether a Trainer has it."""
        return any(isinstance(callback, cls) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit has ended."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, GaLoreAdamW):
                optimizer.project_in_backward(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")
