"""The fewest blocks that have to recompute their activations for a run to fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from ows_lightning.memory.prediction import predict
from ows_lightning.memory.settings import PlanSettings


def fewest_recomputed(settings: PlanSettings, budget: float) -> int:
    """Returns for how many blocks, from below, recomputation makes a run fit; all of them if nothing does.

    Args:
        settings: The run; its own ``gradient_checkpointing`` does not matter.
        budget: Bytes that the device has.

    Raises:
        UsageError: The model can't be followed, or can't recompute some of its blocks alone.
    """

    def fits(number: int) -> bool:
        return predict(replace(settings, gradient_checkpointing=number)).peak_bytes <= budget

    return 0 if fits(0) else bisect_left(range(settings.blocks), True, lo=1, key=fits)
