"""Hooks that consume gradients within backward: for each parameter those of one optimizer, the newest that is alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ows_lightning.compat import num_gradient_hooks

_in_place: Any = WeakTensorKeyDictionary()  # parameter -> handle of its present hook, and a reference to the owner


def hook_gradients(parameters: Iterable[Tensor], owner: Any, consume: Callable[[Any, Tensor], None]) -> None:
    """Calls ``consume(owner, p)`` within backward, as soon as the gradient of a parameter p has added up.

    The hook does not keep ``owner`` alive, and is removed with it. It replaces the hook of another owner.

    Args:
        parameters: Leaf tensors of any shape; those that are frozen now are hooked for when they train.
        owner: Any object that can be referenced weakly.
        consume: Called with the owner and the parameter; it may set ``p.grad`` to None.
    """
    reference = weakref.ref(owner)

    def hook(p: Tensor) -> None:
        if (alive := reference()) is not None:
            consume(alive, p)

    handles = []
    for p in parameters:
        remove_hook(p)
        trains = p.requires_grad
        p.requires_grad_(True)  # torch refuses to hook a frozen weight, whose hook would hold all the same
        handle = p.register_post_accumulate_grad_hook(hook)
        _in_place[p] = handle, reference
        p.requires_grad_(trains)
        handles.append(handle)
    weakref.finalize(owner, _remove, handles).atexit = False


def remove_hook(p: Tensor) -> None:
    """Removes a parameter's hook, whoever owns it: its gradient stays in ``p.grad`` again.

    Args:
        p: A parameter, with or without a hook.
    """
    if (known := _in_place.pop(p, None)) is not None:
        known[0].remove()


def sole_consumer(p: Tensor) -> Any | None:
    """Returns whose hook gets a parameter's gradient; None if nobody's does, or if others look at that gradient, too.

    Args:
        p: A parameter, with or without hooks.
    """
    known = _in_place.get(p)
    return known[1]() if known is not None and num_gradient_hooks(p) == 1 else None


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
