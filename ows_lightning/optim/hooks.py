"""Hooks that consume gradients within backward: for each parameter those of one optimizer, the newest that is alive."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from ows_lightning.compat import gradient_hooks

if TYPE_CHECKING:
    from ows_lightning.optim.gradient_capture import GradientCapture


class _Hook:
    """What torch calls when a parameter's gradient has been accumulated; it does not keep its owner alive."""

    def __init__(self, p: Tensor, owner: GradientCapture) -> None:
        self.owner = weakref.ref(owner)
        self.remove = weakref.finalize(owner, p.register_post_accumulate_grad_hook(self).remove)
        self.remove.atexit = False

    def __call__(self, p: Tensor) -> None:
        if (alive := self.owner()) is not None:
            alive.project_gradient(p)


def hook_gradient(p: Tensor, owner: GradientCapture) -> None:
    """Calls ``owner.project_gradient(p)`` within backward, once the gradient of p is accumulated, while the owner lives."""
    trains = p.requires_grad
    p.requires_grad_(True)  # torch accepts no hook on a frozen weight, but keeps one if it is frozen later
    _Hook(p, owner)
    p.requires_grad_(trains)


def remove_hook(p: Tensor, owner: GradientCapture | None = None) -> None:
    """Removes a parameter's hook, of this owner or, without one, of any: its gradient stays in ``p.grad`` again."""
    for hook in (hook for hook in gradient_hooks(p) if isinstance(hook, _Hook)):
        gradients = getattr(hook.owner(), "projected_gradients", None)  # which Lightning's wrapper of an optimizer shares
        if owner is None or gradients is owner.projected_gradients:
            hook.remove()


def gradient_consumer(p: Tensor) -> GradientCapture | None:
    """Returns the optimizer that takes a parameter's gradient; None without one, or if other hooks see the gradient, too."""
    hooks = gradient_hooks(p)
    return hooks[0].owner() if len(hooks) == 1 and isinstance(hooks[0], _Hook) else None
