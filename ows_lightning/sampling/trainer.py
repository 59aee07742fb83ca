"""What sampled and projected training needs of a Trainer: a strategy, gradient clipping, and cleaning up after a fit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.optim import Optimizer

from ows_lightning.errors import UsageError
from ows_lightning.optim.galore import GaLoreAdamW


def require_layerwise(strategy: object) -> None:
    """Refuses strategies that can't freeze and unfreeze weights during a run, or can't project gradients.

    Args:
        strategy: A strategy of Lightning's, or the name of one.

    Raises:
        UsageError: With the strategy to choose instead.
    """
    name = strategy if isinstance(strategy, str) else ""
    if isinstance(strategy, FSDPStrategy) or (name.startswith("fsdp") and name != "fsdp2"):
        reason = "FSDP1 shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    elif (isinstance(strategy, DDPStrategy) and not getattr(strategy, "averages_changing_blocks", False)) or (
        name.startswith("ddp") and name != "ddp_layerwise"
    ):
        reason = "DDP fixes the set of trained parameters, and averages full gradients; write strategy: ddp_layerwise"
    elif type(strategy).__name__ == "DeepSpeedStrategy" or name.startswith("deepspeed"):
        reason = "DeepSpeed shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    else:
        return
    raise UsageError(f"trainer.strategy: {name or type(strategy).__name__} can't train sampled or projected weights: {reason}")


def patch_clipping(precision: Precision) -> None:
    """Makes Lightning clip by the optimizer's ``clip_gradients`` where it has one, as GaLoreAdamW does.

    All of Lightning's clipping ends in ``precision.clip_gradients``: ``gradient_clip_val``, and a module's own call in
    ``configure_gradient_clipping`` or in manual optimization. By itself it clips ``grad``, where
    gradients that were projected in backward are missing.

    Args:
        precision: The Trainer's precision plugin, changed in place until ``unpatch_clipping``.
    """
    unpatch_clipping(precision)
    lightnings = precision.clip_gradients

    def clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        own = getattr(optimizer, "clip_gradients", None)
        if own is None:
            lightnings(optimizer, clip_val, gradient_clip_algorithm)
        elif clip_val > 0:
            own(clip_val, gradient_clip_algorithm)

    precision.clip_gradients = clip_gradients  # type: ignore[method-assign]


def unpatch_clipping(precision: Precision) -> None:
    """Undoes ``patch_clipping``, if it was called."""
    vars(precision).pop("clip_gradients", None)


class LeaveGradients(Callback):
    """Leaves gradients to ``grad``, and weights whole, when a fit has ended, also by an exception: any code may train them."""

    @classmethod
    def is_in(cls, trainer: Trainer) -> bool:
        """Whether a Trainer has this callback."""
        return any(isinstance(callback, cls) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves them so at the end of a fit."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, GaLoreAdamW):
                optimizer.project_in_backward(False)
                optimizer.take_in_updates()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")
