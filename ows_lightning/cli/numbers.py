"""Every number of a config, checked before anything is loaded: none is infinite or NaN, and those we know are in range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ows_lightning.errors import UsageError


def _above_zero(value: float) -> bool:
    return value > 0


def _from_zero(value: float) -> bool:
    return value >= 0


def _unless_minus_one(value: float) -> bool:
    return value >= -1


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("eps", "weight_decay", "momentum", "dampening"), (_from_zero, "at least 0")),
    "betas": (lambda value: 0 <= value < 1, "at least 0 and below 1, both of them"),
    **dict.fromkeys(("max_steps", "max_epochs", "num_sanity_val_steps", "save_top_k"), (_unless_minus_one, "at least -1")),
    **dict.fromkeys(
        (
            "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
            "min_steps", "min_epochs", "reload_dataloaders_every_n_epochs", "every_n_train_steps",
            "gradient_clip_val", "num_workers",
        ),
        (_from_zero, "at least 0"),
    ),
    "seed": (_from_zero, "at least 0"),
    "log_every_n_steps": (lambda value: value >= 1, "at least 1; `trainer.logger: false` logs nothing"),
}  # fmt: skip
"""The range of a number, by the last word of its key."""


def check_numbers(config: Mapping[str, Any]) -> None:
    """Checks all numbers of a parsed config, those of optimizers and callbacks included.

    Args:
        config: The config of one command.

    Raises:
        UsageError: One is not finite, beyond 64 bits, or out of its range; names its key.
    """
    for key, value in numbers(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}: {value} is not finite; give a number, or leave the key out")
        if not -(2**63) <= value < 2**63:
            raise UsageError(f"{key}: {value:.3g} is beyond 64 bits; give a smaller number")
        known = _RANGES.get(key.rpartition(".")[2])
        if known is not None and not known[0](value):
            raise UsageError(f"{key}: {value} is out of range; it must be {known[1]}")


def check_rate(config: Mapping[str, Any]) -> None:
    """Refuses a learning rate of 0 or below, of any optimizer."""
    for key, value in numbers(config):
        if key.startswith("model.") and key.endswith((".lr", ".learning_rate")) and not value > 0:
            raise UsageError(f"{key}: {value} must be above 0; with it nothing would train")


def numbers(config: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Yields the key and the value of every number, keys as a user writes them: without ``init_args``."""
    if hasattr(config, "as_dict"):
        config = config.as_dict()
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from numbers(value, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip("."))
    elif isinstance(config, Sequence) and not isinstance(config, (str, bytes)):
        for value in config:
            yield from numbers(value, key)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, config
