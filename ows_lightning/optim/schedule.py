"""The learning rate's schedule: warm-up, then decay.

Its rates are those of ``transformers.get_scheduler``; it is not used because ``optim`` needs torch alone.
"""

from __future__ import annotations

import logging
import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ows_lightning.errors import UsageError

log = logging.getLogger(__name__)


def warmup_and_decay(optimizer: Optimizer, kind: str, warmup_steps: float, steps: float) -> LambdaLR:
    """Returns a schedule by optimizer steps: a linear warm-up from 0, then ``cosine`` or ``linear`` to 0, or ``constant``.

    Args:
        optimizer: Its groups' learning rates are the highest ones.
        kind: The decay.
        warmup_steps: Steps of warm-up; below 1 a share of all steps.
        steps: Number of steps of the run; infinite if it is not known.

    Raises:
        UsageError: The number of steps is needed and not known.
    """
    if math.isinf(steps) and (kind != "constant" or 0 < warmup_steps < 1):
        raise UsageError(
            "trainer.max_steps: the schedule needs the number of steps; give max_steps or max_epochs, or set "
            "model.lr_scheduler_type to constant and model.warmup_steps to a number of steps"
        )
    warmup = round(warmup_steps * steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    if 0 < warmup >= steps:
        log.warning(
            "model.warmup_steps: %d are no less than the run's %d steps: the rate never reaches its value", warmup, steps
        )

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if kind == "constant":
            return 1.0
        if kind == "linear":
            return max(0.0, (steps - step) / max(1, steps - warmup))
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup)))))

    return LambdaLR(optimizer, factor)
