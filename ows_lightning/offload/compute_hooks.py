"""Hooks on blocks, which tell the offloader what computes: forward passes, backward passes, recomputation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ows_lightning.compat import backward_pass_id, in_backward, on_backward_end
from ows_lightning.errors import RunError

if TYPE_CHECKING:
    from ows_lightning.offload.offloader import BlockOffloader


class ComputeHooks:
    """The events of `FetchSchedule`, from hooks on an offloader's blocks.

    * forward pre-hook and hook: *enter* and *leave forward*;
    * tensor hooks on a block's output and on its inputs: *enter* and *leave backward*. The first fires before checkpointing
      recomputes the block. Inputs that need no gradient, and leaves, have no hook; their block is left when backward ends.
    """

    def __init__(self, offloader: BlockOffloader) -> None:
        self.offloader = offloader
        self._backward = -1
        for index, block in enumerate(offloader.blocks):
            block.register_forward_pre_hook(partial(self._before_forward, index), with_kwargs=True)
            block.register_forward_hook(partial(self._after_forward, index))

    @torch.compiler.disable
    def _before_forward(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():  # recomputation: the hook on the output has brought the block
            return
        if index == 0:
            self.offloader.end_pass()
            if torch.is_grad_enabled():
                self.offloader.apply_draw()
            self.offloader.schedule.begin_forward()
        self.offloader.prepare()
        schedule = self.offloader.schedule
        if schedule.is_offloaded(index):
            schedule.enter(index)
            inputs = _tensors_with_gradient((args, kwargs))
            if any(tensor.is_leaf for tensor in inputs):  # it would keep the hook for later passes
                return
            leave = partial(self._leave_backward, index, self.offloader.layout_id)
            if len(inputs) == 1:
                inputs[0].register_hook(leave)
            elif inputs:
                torch.autograd.graph.register_multi_grad_hook(inputs, leave)

    @torch.compiler.disable
    def _after_forward(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        schedule = self.offloader.schedule
        if in_backward() or not schedule.is_offloaded(index):
            return
        outputs = _tensors_with_gradient(output)
        for tensor in outputs:
            tensor.register_hook(partial(self._enter_backward, index, self.offloader.layout_id))
        schedule.leave_forward(index, needed_in_backward=bool(outputs))

    def _enter_backward(self, index: int, layout_id: object, gradient: Tensor) -> None:
        self._check_unchanged(layout_id)
        if (running := backward_pass_id()) != self._backward:
            self._backward = running
            on_backward_end(self.offloader.schedule.end_backward)
        self.offloader.schedule.enter(index)

    def _leave_backward(self, index: int, layout_id: object, gradient: Any) -> None:
        self._check_unchanged(layout_id)
        self.offloader.schedule.leave_backward(index)

    def _check_unchanged(self, layout_id: object) -> None:
        if layout_id is not self.offloader.layout_id:
            fault = "other blocks train in backward than did in forward, or what rests was merged, so that frozen ones changed"
            raise RunError(f"model.frozen_in: {fault}; change `requires_grad` and the device, and save, between two steps")


def _tensors_with_gradient(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values] if values.requires_grad else []
    values = [*values.values()] if isinstance(values, dict) else values
    entries = values if isinstance(values, (tuple, list)) else ()
    return [tensor for entry in entries for tensor in _tensors_with_gradient(entry)]
