"""Projection in backward lasts as long as the fit, and Lightning clips what is projected."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from ows_lightning.errors import first_line
from ows_lightning.optim.galore import GaLoreAdamW

log = logging.getLogger(__name__)


def patch_clipping(precision: Precision) -> None:
    """Makes Lightning clip by the optimizer's ``clip_gradients`` where it has one, as GaLoreAdamW does.

    All of Lightning's clipping ends in ``clip_gradients`` of the Trainer's precision plugin: ``gradient_clip_val``, and a
    module's own call in ``configure_gradient_clipping`` or in manual optimization. By itself it clips ``grad``, where
    gradients that were projected in backward are missing.
    """
    vars(precision).pop("clip_gradients", None)  # of a run that ended without its teardown
    original = precision.clip_gradients

    def clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        own = getattr(optimizer, "clip_gradients", None)
        if own is None:
            original(optimizer, clip_val, gradient_clip_algorithm)
        elif clip_val > 0:
            own(clip_val, gradient_clip_algorithm)

    precision.clip_gradients = clip_gradients  # type: ignore[method-assign]


def prepare_fit(trainer: Trainer) -> None:
    """Patches the clipping, and adds the clean-up after the fit; the module and a callback may both call it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if RestoreAfterFit not in map(type, callbacks):  # not by `configure_callbacks`, which subclasses override
        callbacks.append(RestoreAfterFit())
    patch_clipping(trainer.precision_plugin)


class RestoreAfterFit(Callback):
    """Ends projection in backward, and merges what blocks learned at rest, when a fit ends: any code may train the model."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends projection, merges what was learned at rest, and gives Lightning its own clipping back."""
        if stage == "fit":
            vars(trainer.precision_plugin).pop("clip_gradients", None)  # undoes ``patch_clipping``
            for optimizer in (one for one in trainer.optimizers if isinstance(one, GaLoreAdamW)):
                optimizer.project_in_backward(False)
                optimizer.merge_updates()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        try:
            self.teardown(trainer, pl_module, "fit")
        except RuntimeError as error:  # a full GPU has no room for a block either, and the first error is what counts
            log.warning("What offloaded blocks have learned at rest is lost (%s)", first_line(error))
