"""What else reaches into a model's blocks, and has to find whole weights there: state dicts, ``to``, and peft."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ows_lightning.offload.offloader import BlockOffloader


def add_access_hooks(offloader: BlockOffloader) -> None:
    """Lets others find whole weights in an offloader's blocks, and the offloader see what they write.

    * An unfinished pass is ended before a state dict is taken; loaded weights are used from the next fetch on.
    * What moves the model, ``to`` or a Trainer, leaves the blocks where they are offloaded and moves the offloader.
    * peft merges adapters into a weight's ``data``, which torch does not count as a write.
    """
    for index, block in enumerate(offloader.blocks):
        block.register_state_dict_pre_hook(partial(_before_state_dict, offloader))
        block.register_load_state_dict_pre_hook(partial(_before_write, offloader, index))
        block.register_load_state_dict_post_hook(partial(offloader.refresh, index))
        block._apply = partial(_apply_to_block, offloader, index)  # type: ignore[method-assign]
        block.offloader = offloader  # type: ignore[assignment]  # for `on_device` and `end_offloaded_pass`
        # The layers of peft that merge adapters into their weights.
        for adapted in [m for m in block.modules() if hasattr(type(m), "merge") and hasattr(type(m), "unmerge")]:
            for name in ("merge", "unmerge"):
                setattr(adapted, name, partial(_write, offloader, index, getattr(type(adapted), name), adapted))


def _before_state_dict(offloader: BlockOffloader, block: nn.Module, prefix: str, keep_vars: bool) -> None:
    offloader.end_pass()
    if not offloader.saves_updates_separately:
        offloader.merge_updates()


def _before_write(offloader: BlockOffloader, index: int, *_: Any) -> None:
    offloader.end_pass()
    offloader.merge_updates()  # else what was learned at rest would be added to what is written
    offloader.make_writable(index)


def _write(offloader: BlockOffloader, index: int, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what writes into a block's weights, wherever they are."""
    _before_write(offloader, index)
    result = write(*args, **kwargs)
    offloader.refresh(index)
    return result


def _apply_to_block(offloader: BlockOffloader, index: int, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Takes the place of a block's ``_apply``, through which ``to``, ``half`` and the like pass."""
    offloader.set_device(fn(torch.empty(0, device=offloader.device)).device)
    block, parameters = offloader.blocks[index], offloader.parameters[index]
    if any(fn(torch.empty(0, dtype=p.dtype)).dtype != p.dtype for p in parameters):
        offloader.convert(index, fn)
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            gradient.data = fn(gradient.data)
    ids = {id(p) for p in parameters}
    return type(block)._apply(block, lambda tensor: tensor if id(tensor) in ids else fn(tensor), recurse)
