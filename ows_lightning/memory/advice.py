"""What would make a run fit a card."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ows_lightning.memory.devices import is_sharded
from ows_lightning.memory.prediction import MethodPlan, predict
from ows_lightning.memory.settings import PlanSettings


def advise(settings: PlanSettings, card: int, predict: Callable[[PlanSettings], MethodPlan] = predict) -> str:
    """Says in a sentence what would make a run fit a card: the first of `_milder` that does, with the largest batches.

    Args:
        settings: A run that does not fit.
        card: The card's size in GB.
        predict: Predicts a run's memory.
    """
    milder = list(_milder(settings))
    least = _with_batch_size(milder[-1][0], 1)
    if not predict(least).fits(card):
        more = "more devices" if is_sharded(settings) else "several devices with the strategy fsdp2"
        return f"does not fit, takes {predict(least).peak_bytes / 1e9:.1f} GB at the least; use {more}"
    sizes = [settings.batch_size >> halvings for halvings in range(settings.batch_size.bit_length())]

    def fitting(changed: PlanSettings) -> list[int]:
        return sizes[bisect_left(sizes, True, key=lambda size: predict(_with_batch_size(changed, size)).fits(card)) :]

    best, keys = next((_with_batch_size(changed, size), keys) for changed, keys in milder for size in fitting(changed))
    if best.batch_size < settings.batch_size:
        sizes_keys = ("data.batch_size", best.batch_size), ("trainer.accumulate_grad_batches", best.accumulate_grad_batches)
        keys = [f"{key} {value}" for key, value in sizes_keys] + keys
    return f"fits with {', '.join(keys[:-1])}{' and ' * (len(keys) > 1)}{keys[-1]}"


def _with_batch_size(settings: PlanSettings, size: int) -> PlanSettings:
    """The same rows in a step, in smaller micro-batches."""
    times = -(-settings.batch_size // size)
    return replace(settings, batch_size=size, accumulate_grad_batches=settings.accumulate_grad_batches * times)


def _milder(settings: PlanSettings) -> Iterator[tuple[PlanSettings, list[str]]]:
    """Yields settings that need less and less, each with the keys that differ."""
    keys: list[str] = []
    yield settings, []
    if not settings.gradient_checkpointing:
        settings = replace(settings, gradient_checkpointing=True)
        keys.append("model.gradient_checkpointing true")
        yield settings, list(keys)
    if settings.dtype == torch.float32:
        settings = replace(settings, precision="bf16-true")
        keys.append("trainer.precision bf16-true")
        yield settings, list(keys)
    method, count = settings.method, settings.method.activated_layers
    if count is None:
        return
    if set(method.always_train) - {"norm"}:
        method = replace(method, always_train=("norm",))
        keys.append("sampling.always_train [norm]")
        yield replace(settings, method=method), list(keys)
    while (count := count // 2) > 0:
        fewer = replace(settings, method=replace(method, activated_layers=count))
        yield fewer, [*keys, f"sampling.activated_layers {count}"]
