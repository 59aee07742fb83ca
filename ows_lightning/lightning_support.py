"""What sampled and projected training needs of a Trainer: strategy, callbacks, steps, clipping, a clean-up after a fit."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as stock
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from ows_lightning.errors import UsageError, first_line
from ows_lightning.optim.galore import GaLoreAdamW

log = logging.getLogger(__name__)

_UNSUITABLE_CALLBACKS = {
    stock.StochasticWeightAveraging: "copies the model before it is loaded; take WeightAveraging or EMAWeightAveraging",
    stock.ModelPruning: "looks for weights before they are loaded; prune the exported model by torch.nn.utils.prune",
    stock.BackboneFinetuning: "freezes a `backbone`, which the model does not have; sampling.always_train names what trains",
    stock.LearningRateFinder: "tries rates without sampling, and the schedule sets others; compare runs of a few steps",
    stock.BatchSizeFinder: "tries sizes without sampling, and the schedule keeps its steps; `plan` names a size that fits",
}
"""Callbacks of Lightning that can't work with CausalLMModule: why, and what to do instead."""
_PROJECTED = "gradients are projected in backward, before that can be undone"


def expected_steps(trainer: Trainer) -> float:
    """A fit's optimizer steps; inf where nobody knows them, as of a stream without a length, for which Lightning has -1."""
    steps, batches, epochs = trainer.estimated_stepping_batches, trainer.num_training_batches, trainer.max_epochs or -1
    if epochs > 0 and 0 < batches < math.inf:  # Lightning takes the current accumulation for all epochs
        limit = trainer.max_steps if trainer.max_steps >= 0 else math.inf
        return min(limit, steps_before(trainer, batches * min(epochs, limit)))  # an epoch has at least one step
    return steps if steps >= 0 else math.inf


def steps_before(trainer: Trainer, batch: float) -> int:
    """How many optimizer steps of a fit are done when a batch comes; batches are counted from 0, over all epochs."""
    epochs, place = divmod(batch, trainer.num_training_batches)
    steps = sum(-(-trainer.num_training_batches // micro_batches_per_step(trainer, epoch)) for epoch in range(int(epochs)))
    return int(steps + place // micro_batches_per_step(trainer, int(epochs)))


def accumulation_scheduler(trainer: Trainer) -> stock.GradientAccumulationScheduler | None:
    """Returns Lightning's callback that changes how many batches accumulate; of several the last one, which prevails."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in reversed(callbacks) if isinstance(one, stock.GradientAccumulationScheduler)), None)


def micro_batches_per_step(trainer: Trainer, epoch: int = 0) -> int:
    """How many backward passes make a step in an epoch; Lightning's scheduler tells the Trainer only when it begins."""
    scheduler = accumulation_scheduler(trainer)
    return trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)


def time_is_up(callbacks: Iterable[Callback]) -> bool:
    """Whether a Timer among a Trainer's callbacks, which ``max_time`` makes, leaves no time to train."""
    return any(isinstance(one, stock.Timer) and (left := one.time_remaining()) is not None and left <= 0 for one in callbacks)


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuses callbacks of Lightning that can't work with CausalLMModule: a UsageError."""
    for kind, reason in _UNSUITABLE_CALLBACKS.items():
        if any(isinstance(one, kind) and not getattr(one, "_early_exit", False) for one in callbacks):  # not its Tuner's
            raise UsageError(f"trainer.callbacks: {kind.__name__} {reason}")


def check_strategy(strategy: object) -> None:
    """Refuses a strategy, or its name, in which trained blocks can't change or gradients can't be projected: a UsageError."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    kinds = {kind.__name__ for kind in type(strategy).__mro__}  # of pytorch_lightning, too, whose classes are others
    fixed = "DDPStrategy" in kinds and not getattr(strategy, "averages_changing_blocks", False)
    if kinds & {"FSDPStrategy", "DeepSpeedStrategy"} or re.match("fsdp(?!2$)|deepspeed", name):
        reason = "it shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    elif fixed and getattr(strategy, "_start_method", "popen") != "popen":
        reason = "it fixes the set of trained parameters; in a notebook set devices: 1, or start a script with ddp_layerwise"
    elif fixed or re.match("ddp(?!_layerwise$)", name):
        reason = "it fixes the set of trained parameters, and averages full gradients; write strategy: ddp_layerwise"
    else:
        return
    raise UsageError(f"trainer.strategy: {name} can't train sampled or projected weights: {reason}")


def check_unscaled(precision: Precision | str, why: str = _PROJECTED) -> None:
    """Refuses a precision, or its name, that scales the loss, as ``16-mixed`` does: a UsageError, which says why."""
    name = str(getattr(precision, "precision", precision))
    if name in ("16-mixed", "16") or getattr(precision, "scaler", None) is not None:
        raise UsageError(f"trainer.precision: {name} scales the loss, but {why}; write bf16-mixed, bf16-true or 32-true")


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
    """Checks a Trainer's callbacks for CausalLMModule, adds the clean-up after a fit, and patches the clipping."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    check_callbacks(callbacks)
    if RestoreAfterFit not in map(type, callbacks):  # not by `configure_callbacks`, which subclasses override
        callbacks.append(RestoreAfterFit())
    patch_clipping(trainer.precision_plugin)


def stop_projecting(trainer: Trainer) -> None:
    """Ends projection in backward by the Trainer's optimizers, and clipping by them: any code may train the model next."""
    vars(trainer.precision_plugin).pop("clip_gradients", None)  # undoes ``patch_clipping``
    for optimizer in (one for one in trainer.optimizers if isinstance(one, GaLoreAdamW)):
        optimizer.project_in_backward(False)


class RestoreAfterFit(Callback):
    """Ends projection in backward, and merges what blocks learned at rest, when a fit ends: any code may train the model."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends projection, merges what was learned at rest, and gives Lightning its own clipping back."""
        if stage == "fit":
            stop_projecting(trainer)
            for optimizer in (one for one in trainer.optimizers if isinstance(one, GaLoreAdamW)):
                optimizer.merge_updates()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        try:
            self.teardown(trainer, pl_module, "fit")
        except RuntimeError as error:  # a full GPU has no room for a block either, and the first error is what counts
            log.warning("What offloaded blocks have learned at rest is lost (%s)", first_line(error))
