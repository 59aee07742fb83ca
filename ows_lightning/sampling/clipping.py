"""Lightning's gradient clipping, for optimizers that keep a step's gradients themselves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer


def clip_what_is_consumed(precision: Precision) -> None:
    """Makes Lightning clip by the optimizer's ``clip_gradients`` where it has one, as GaLoreAdamW does.

    All of Lightning's clipping ends in ``precision.clip_gradients``: ``gradient_clip_val``, and a module's own call in
    ``configure_gradient_clipping`` or in manual optimization. By itself it clips ``grad``, where
    gradients that were projected in backward are missing.

    Args:
        precision: The Trainer's precision plugin, changed in place until ``clip_grad_alone``.
    """
    clip_grad_alone(precision)
    lightnings = precision.clip_gradients

    def clip_gradients(optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        own = getattr(optimizer, "clip_gradients", None)
        if own is None:
            lightnings(optimizer, clip_val, gradient_clip_algorithm)
        elif clip_val > 0:
            own(clip_val, gradient_clip_algorithm)

    precision.clip_gradients = clip_gradients  # type: ignore[method-assign]


def clip_grad_alone(precision: Precision) -> None:
    """Undoes ``clip_what_is_consumed``, if it was called."""
    vars(precision).pop("clip_gradients", None)
