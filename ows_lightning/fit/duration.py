"""How long a fit goes on: its optimizer steps, also where the accumulation changes, and its time."""

import math
from collections.abc import Iterable

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer


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


def accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """Returns Lightning's callback that changes how many batches accumulate; of several the last one, which prevails."""
    return next((one for one in reversed(trainer.callbacks) if isinstance(one, GradientAccumulationScheduler)), None)  # type: ignore[attr-defined]


def micro_batches_per_step(trainer: Trainer, epoch: int = 0) -> int:
    """How many backward passes make a step in an epoch; Lightning's scheduler tells the Trainer only when it begins."""
    scheduler = accumulation_scheduler(trainer)
    return trainer.accumulate_grad_batches if scheduler is None else scheduler.get_accumulate_grad_batches(epoch)


def time_is_up(callbacks: Iterable[Callback]) -> bool:
    """Whether a Timer among a Trainer's callbacks, which ``max_time`` makes, leaves no time to train."""
    return any(isinstance(one, Timer) and (left := one.time_remaining()) is not None and left <= 0 for one in callbacks)
