"""Who consumes a parameter's gradient within backward: one optimizer at a time, the newest, as long as it lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

_in_place: Any = WeakTensorKeyDictionary()  # parameter -> handle of the hook that it has now


def hook_gradients(parameters: Iterable[Tensor], owner: Any, consume: Callable[[Any, Tensor], None]) -> None:
    """Calls ``consume(owner, p)`` within backward, as soon as the gradient of a parameter p has added up.

    The hook does not keep ``owner`` alive, and goes with it; it takes the place of another owner's.

    Args:
        parameters: Leaf tensors that require a gradient, of any shape.
        owner: Any object that can be referred to weakly.
        consume: May set ``p.grad`` to None.
    """
    reference = weakref.ref(owner)

    def hook(p: Tensor) -> None:
        if (alive := reference()) is not None:
            consume(alive, p)

    handles = []
    for p in parameters:
        remove_hook(p)
        _in_place[p] = handle = p.register_post_accumulate_grad_hook(hook)
        handles.append(handle)
    weakref.finalize(owner, _remove, handles).atexit = False


def remove_hook(p: Tensor) -> None:
    """Leaves a parameter's gradient to ``p.grad`` again, whoever consumed it."""
    if (handle := _in_place.pop(p, None)) is not None:
        handle.remove()


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
