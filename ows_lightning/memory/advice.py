"""What would make a run fit a card."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ows_lightning.memory.devices import is_sharded
from ows_lightning.memory.prediction import MethodPlan, predict
from ows_lightning.memory.settings import PlanSettings
from ows_lightning.memory.streamed import resident_weights

Changes = dict[str, Any]
"""Keys of a config, dotted, and their new values."""


def advise(settings: PlanSettings, card: int, predict: Callable[[PlanSettings], MethodPlan] = predict) -> str:
    """Says in a sentence what would make a run fit a card, or that nothing does; arguments as of `changes_that_fit`."""
    changes = changes_that_fit(settings, card, predict)
    if changes is None:
        *_, (least, _) = _milder(settings)
        more = "more devices" if is_sharded(settings) else "several devices with the strategy fsdp2"
        return f"does not fit, takes {predict(_with_batch_size(least, 1)).peak_bytes / 1e9:.1f} GB at the least; use {more}"
    return f"fits with {sentence(changes)}" if changes else "fits"


def changes_that_fit(
    settings: PlanSettings, card: int, predict: Callable[[PlanSettings], MethodPlan] = predict
) -> Changes | None:
    """Returns what would make a run fit a card: the first of `_milder` that does, with the largest batches; None if none does.

    Args:
        settings: The run.
        card: The card's size in GB.
        predict: Predicts a run's memory.
    """
    milder = list(_milder(settings))
    if not predict(_with_batch_size(milder[-1][0], 1)).fits(card):
        return None
    sizes = [settings.batch_size >> halvings for halvings in range(settings.batch_size.bit_length())]

    def fitting(changed: PlanSettings) -> list[int]:
        if resident_weights(changed) > card * 1e9:  # a step need not be followed to see that
            return []
        return sizes[bisect_left(sizes, True, key=lambda size: predict(_with_batch_size(changed, size)).fits(card)) :]

    best, changes = next((_with_batch_size(changed, size), keys) for changed, keys in milder for size in fitting(changed))
    if best.batch_size < settings.batch_size:
        sizes_keys = {"data.batch_size": best.batch_size, "trainer.accumulate_grad_batches": best.accumulate_grad_batches}
        changes = {**sizes_keys, **changes}
    return changes


def sentence(changes: Changes) -> str:
    """Words changes as a list of keys and values."""
    parts = [f"{key} {_yaml(value)}" for key, value in changes.items()]
    return f"{', '.join(parts[:-1])}{' and ' * (len(parts) > 1)}{parts[-1]}"


def _yaml(value: Any) -> str:
    return (
        f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _with_batch_size(settings: PlanSettings, size: int) -> PlanSettings:
    """The same rows in a step, in smaller micro-batches."""
    times = -(-settings.batch_size // size)
    return replace(settings, batch_size=size, accumulate_grad_batches=settings.accumulate_grad_batches * times)


def _milder(settings: PlanSettings) -> Iterator[tuple[PlanSettings, Changes]]:
    """Yields settings that need less and less, each with the keys that differ."""
    changes: Changes = {}
    yield settings, {}
    if settings.recomputed < settings.blocks:
        settings = replace(settings, gradient_checkpointing=settings.blocks)
        changes["model.gradient_checkpointing"] = True
        yield settings, dict(changes)
    if settings.dtype == torch.float32:
        settings = replace(settings, precision="bf16-true")
        changes["trainer.precision"] = "bf16-true"
        yield settings, dict(changes)
    method, count = settings.method, settings.method.activated_layers
    some_are_frozen = count is not None or method.lora is not None
    if some_are_frozen and settings.frozen_in == "device" and not is_sharded(settings):
        settings = replace(settings, frozen_in="host")
        changes["model.frozen_in"] = "host"
        yield settings, dict(changes)
    if count is None:
        return
    if set(method.always_train) - {"norm"}:
        method = replace(method, always_train=("norm",))
        changes["sampling.always_train"] = ["norm"]
        yield replace(settings, method=method), dict(changes)
    while (count := count // 2) > 0:
        fewer = replace(settings, method=replace(method, activated_layers=count))
        yield fewer, {**changes, "sampling.activated_layers": count}
