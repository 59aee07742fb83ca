"""The window: slots on the device that frozen blocks pass through, and the hooks that put them there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ows_lightning.compat import backward_pass_id, in_backward, on_backward_end, version_counter
from ows_lightning.errors import RunError
from ows_lightning.models.mapped_files import keep_page_cache
from ows_lightning.streaming.disk import Disk
from ows_lightning.streaming.int8 import Int8Weights, StagingBuffer
from ows_lightning.streaming.offloaded import DeviceWeights, HostWeights, host_weights, nbytes_of, views_in
from ows_lightning.streaming.streams import CopyStream, ReaderThread, copy_stream_for
from ows_lightning.streaming.timeline import Timeline


class BlockOffloader:
    """Lets the frozen decoder blocks of a model wait in host memory, and computes with them on the device.

    A block's parameters stay where they are in the model; what changes is their ``data``. It is the block's home in host
    memory while the block waits, a view of a slot while the block computes, and memory of its own on the device while the
    block trains (any of its parameters requires a gradient). So every optimizer, checkpoint and export sees ordinary
    parameters. No bit of what is computed changes. The events are those of `Timeline`; they come from hooks on the blocks:

    * forward pre-hook and hook: *enter* and *leave forward*;
    * tensor hooks on a block's output and on its inputs: *enter* and *leave backward*. The first fires before checkpointing
      recomputes the block. Inputs that need no gradient have no hook; their block is left when backward ends.

    The window makes homes and slots at first use, and lives on the device that ``move`` named last. Deep copies and pickles
    of the model are independent of it.

    With copies in int8, what a frozen block computes with is not its own weight to the bit; what trains, is saved and comes
    home is.

    Args:
        blocks: The decoder blocks, first block first.
        slots: Blocks that the window holds at a time, at least 2: one computes while the next one comes.
        frozen_only: Only parameters that are frozen now wait, and the others stay on the device: the base below adapters.
        stream: How fetches are ordered against computation; the device's own way if None.
        disk: Blocks wait there, and not in host memory.
        int8_in: Where copies of the blocks wait in int8 (``device``, ``host`` or ``disk``), from which they compute while they
            are frozen; None: they compute from their own weights.

    Raises:
        ValueError: The window is too small.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        slots: int = 2,
        frozen_only: bool = False,
        stream: CopyStream | None = None,
        disk: Disk | None = None,
        int8_in: str | None = None,
    ) -> None:
        if slots < 2:
            raise ValueError(f"slots: {slots} must be at least 2: one block computes while the next one comes")
        self.blocks = list(blocks)
        self.slots = slots
        self.device = torch.device("cpu")
        self._stream = stream
        self._disk = disk
        self._int8_in = int8_in
        self._was_copied = False  # a copy of the model, with which weights may be exchanged
        shared = _in_several_places(self.blocks)
        self.parameters = [
            [p for p in block.parameters() if p.numel() and id(p) not in shared and not (frozen_only and p.requires_grad)]
            for block in self.blocks
        ]
        self._hooks: list[RemovableHandle] = []
        for index, block in enumerate(self.blocks):
            self._hooks += [
                block.register_forward_pre_hook(partial(self._before_forward, index), with_kwargs=True),
                block.register_forward_hook(partial(self._after_forward, index)),
                block.register_state_dict_pre_hook(self._before_state_dict),
                block.register_load_state_dict_pre_hook(partial(self._before_load, index)),
                block.register_load_state_dict_post_hook(partial(self._after_load, index)),
            ]
            # What moves the model, `to` or a Trainer, leaves the blocks where they wait and moves the window.
            block._apply = partial(self._apply_to_block, index)  # type: ignore[method-assign]
            block.offloader = self  # type: ignore[assignment]
            for adapted in _mergeable(block):
                for name in ("merge", "unmerge"):
                    setattr(adapted, name, partial(self._write, index, getattr(type(adapted), name), adapted))
        self._clear()
        if disk is not None:
            self._prepare()  # what is in memory goes to the disk at once

    def _clear(self) -> None:
        self.offloaded: list[HostWeights] = []
        self.timeline = Timeline(self, self.slots)
        self._in_slot: dict[int, list[Tensor]] = {}  # the views of a slot that a waiting block's parameters get
        self._memory: list[Tensor] = []
        self._ordering: CopyStream | None = None
        self._staging: StagingBuffer | None = None
        self._training: bool | None = None
        self._backward = -1
        self._versions: dict[int, list[int]] = {}  # of a waiting block's parameters, when its home was last taken in
        self._arrangement = object()  # of blocks in slots; another one after every change

    def __getstate__(self) -> dict[str, Any]:
        """CopyStream find their weights in their own parameters, and wait in host memory."""
        self.end_pass()
        for index in range(len(self.offloaded)):
            self.make_writable(index)  # weight averaging copies a model, and exchanges weights with the copy later
        self._was_copied = True
        made = {"offloaded", "timeline", "_in_slot", "_memory", "_ordering", "_staging"}
        made |= {"_training", "_backward", "_versions", "_arrangement"}
        return {key: value for key, value in vars(self).items() if key not in made} | {"_disk": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clear()

    # ------------------------------------------------------------------ where blocks are

    @property
    def active(self) -> list[int]:
        """The blocks that train, which have memory of their own on the device."""
        return [index for index in range(len(self.blocks)) if not self.timeline.is_offloaded(index)] if self.offloaded else []

    def apply_draw(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Gives the blocks that train now memory of their own on the device, and brings those home that no longer do.

        Call it after a draw. Without, the next forward pass that records a gradient does it.

        Args:
            optimizers: Their state of blocks that train moves to the device; it may come from a checkpoint, loaded before
                the draw was known.
        """
        trains = [index for index, weights in enumerate(self.parameters) if any(p.requires_grad for p in weights)]
        if not self.offloaded or trains != self.active:
            self._arrange(trains)
            self.timeline.fetch_first()
        for optimizer in optimizers:
            for p in (p for index in trains for p in self.parameters[index]):
                state = optimizer.state.get(p, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and key != "step" and value.device != p.device:
                        state[key] = value.to(p.device)

    def offload_all(self) -> None:
        """Brings all blocks home, and leaves the slots empty; those that train get their memory again when it is needed."""
        if self.offloaded:
            self._arrange([])
            self.timeline.forget()

    def move(self, device: torch.device) -> None:
        """Takes another device for the one that computes."""
        if device == self.device:
            self.timeline.forget()
            return
        self.offload_all()
        self.device = device
        self._clear()

    def end_pass(self) -> None:
        """Ends a pass that was interrupted, and takes in what others wrote into waiting weights, which torch counts."""
        self.timeline.finish()
        changed = [index for index, versions in self._versions.items() if versions != _versions_of(self.parameters[index])]
        if changed:
            with keep_page_cache():
                for index in changed:
                    self.make_writable(index)
            for index in changed:
                self._written(index)

    def make_writable(self, index: int) -> None:
        """Lets others write into a block's home: what slots hold is dropped, and from a model's own file a block moves."""
        self._prepare()
        self.timeline.forget()
        self.offloaded[index].make_writable()
        if self.timeline.is_offloaded(index):
            _point(self.parameters[index], self.offloaded[index].tensors)

    def _write(self, index: int, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls what writes into a block's weights, wherever they are, and takes in what it has written."""
        self.end_pass()
        self.make_writable(index)
        result = write(*args, **kwargs)
        self._written(index)
        return result

    def _written(self, index: int) -> None:
        if self.timeline.is_offloaded(index):
            self.offloaded[index].written()
            self._versions[index] = _versions_of(self.parameters[index])

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Computes with the blocks' own weights, also where their copies in int8 wait."""
        self._prepare()
        copied = [home for home in self.offloaded if isinstance(home, Int8Weights)]
        for home in copied:
            home.fetch_exact = True
        self.timeline.forget()
        try:
            yield
        finally:
            for home in copied:
                home.fetch_exact = False
            self.timeline.forget()

    @contextmanager
    def resident(self, block: nn.Module) -> Iterator[None]:
        """Keeps a block on the device while its weights are looked at outside a forward pass."""
        index = self.blocks.index(block)
        self._prepare()
        if not self.timeline.is_offloaded(index):
            yield
            return
        self.end_pass()
        self.timeline.obtain(index)
        try:
            yield
        finally:
            self.timeline.finish()

    def remove(self) -> None:
        """Brings all blocks home and takes the hooks away: the model is an ordinary one in host memory."""
        self.offload_all()
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            del block.offloader, block._apply
            for adapted in _mergeable(block):  # some may have come later
                for name in ("merge", "unmerge"):
                    vars(adapted).pop(name, None)
        self._clear()

    def _prepare(self) -> None:
        if not self.offloaded:
            self._arrange([])

    @torch.no_grad()
    def _arrange(self, active: Sequence[int]) -> None:
        # What is made within inference mode can't be saved for backward.
        with torch.inference_mode(False):
            self.end_pass()
            before = self.active
            if not self.offloaded:
                self._staging = StagingBuffer(self.device) if self._int8_in in ("host", "disk") else None
                for weights in self.parameters:
                    self.offloaded.append(self._home([p.data for p in weights]))
                    _point(weights, self.offloaded[-1].tensors)
            self.timeline.forget()
            for index in set(before) - set(active):  # first, so that their memory can be used again
                self.offloaded[index].write_back([p.data for p in self.parameters[index]])
                _point(self.parameters[index], self.offloaded[index].tensors)
            for index in sorted(set(active) - set(before)):
                own = [torch.empty_like(home, device=self.device) for home in self.offloaded[index].tensors]
                self.offloaded[index].load_for_training(own)
                _point(self.parameters[index], own)
            self.timeline.arrange([i for i, weights in enumerate(self.parameters) if weights and i not in active])
            self._allocate()
            waiting = self.timeline.order
            self._arrangement = object()
            self._versions = {i: _versions_of(self.parameters[i]) for i in waiting}
            self._in_slot = {i: views_in(self._memory[self.timeline.slot_of(i)], self.offloaded[i].tensors) for i in waiting}

    def _home(self, weights: Sequence[Tensor]) -> HostWeights:
        in_host = partial(host_weights, device=self.device)
        exact_weights = in_host(weights) if self._disk is None else self._disk.offload(weights)
        if self._int8_in is None:
            return exact_weights
        keep = partial(DeviceWeights, device=self.device) if self._int8_in == "device" else in_host
        return Int8Weights(
            exact_weights, self._disk.offload if self._disk and self._int8_in == "disk" else keep, self._staging
        )

    def _allocate(self) -> None:
        """Makes the slots, once: they stay for as long as the window is on this device."""
        if self._memory:
            return
        size = max(nbytes_of(home.tensors) for home in self.offloaded)
        whole = torch.empty(self.slots * size, dtype=torch.uint8, device=self.device)
        self._memory = list(whole.split(size)) if size else [whole] * self.slots
        self._ordering = self._stream or copy_stream_for(self.device, self.slots)
        if self._disk is not None:
            self._ordering = ReaderThread(self._ordering)

    # ------------------------------------------------------------------ events, as the timeline orders them

    def issue(self, block: int, slot: int) -> None:
        """Starts to fetch a block."""
        assert self._ordering is not None
        self._ordering.issue(slot, partial(self.offloaded[block].fetch, self._in_slot[block]))

    def wait(self, block: int, slot: int) -> None:
        """Lets a block's parameters be the slot, once the block is there."""
        assert self._ordering is not None
        self._ordering.wait(slot)
        _point(self.parameters[block], self._in_slot[block])

    def release(self, block: int, slot: int) -> None:
        """Lets a block's parameters be its home again, and the slot be written."""
        assert self._ordering is not None
        _point(self.parameters[block], self.offloaded[block].tensors)
        self._ordering.release(slot)

    # ------------------------------------------------------------------ hooks

    @torch._dynamo.disable
    def _before_forward(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():  # recomputation: the hook on the output has brought the block
            return
        if index == 0:
            self._begin_forward(block.training)
        self._prepare()
        if self.timeline.is_offloaded(index):
            self.timeline.enter_forward(index)
            inputs = list(_tensors_with_gradient((args, kwargs)))
            leave = partial(self._leave_backward, index, self._arrangement)
            if len(inputs) == 1:
                inputs[0].register_hook(leave)
            elif inputs:
                torch.autograd.graph.register_multi_grad_hook(inputs, leave)

    @torch._dynamo.disable
    def _after_forward(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if in_backward() or not self.timeline.is_offloaded(index):
            return
        outputs = list(_tensors_with_gradient(output))
        for tensor in outputs:
            tensor.register_hook(partial(self._enter_backward, index, self._arrangement))
        self.timeline.leave_forward(index, needed_in_backward=bool(outputs))

    def _begin_forward(self, training: bool) -> None:
        self.end_pass()
        if torch.is_grad_enabled():
            self.apply_draw()
        self.timeline.begin_forward()
        if self._training is not None and training != self._training:
            self.timeline.forget()  # between training and evaluation, weight averaging exchanges the weights
            for index in self.timeline.order if self._was_copied else ():
                self._written(index)
        self._training = training

    def _enter_backward(self, index: int, arrangement: object, gradient: Tensor) -> None:
        self._require(arrangement)
        task = backward_pass_id()
        if task != self._backward:
            self._backward = task
            on_backward_end(self.timeline.end_backward)
        self.timeline.enter_backward(index)

    def _leave_backward(self, index: int, arrangement: object, gradient: Any) -> None:
        self._require(arrangement)
        self.timeline.leave_backward(index)

    def _require(self, arrangement: object) -> None:
        if arrangement is not self._arrangement:
            raise RunError(
                "model.frozen_in: other blocks train in backward than did in forward, so that frozen ones have moved; change "
                "`requires_grad` and the device between two steps"
            )

    def _apply_to_block(self, index: int, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.move(fn(torch.empty(0, device=self.device)).device)
        weights, block = self.parameters[index], self.blocks[index]
        if any(fn(torch.empty(0, dtype=p.dtype)).dtype != p.dtype for p in weights):
            self._convert(index, fn)
        waiting = {id(p) for p in weights}
        return type(block)._apply(block, lambda tensor: tensor if id(tensor) in waiting else fn(tensor), recurse)

    @torch.no_grad()
    def _convert(self, index: int, fn: Callable[[Tensor], Tensor]) -> None:
        """Gives a block a home of another dtype."""
        self._prepare()
        self.offload_all()
        weights = self.parameters[index]
        for p in weights:
            p.data, p.grad = fn(p.data).to("cpu"), None
        self.offloaded[index] = self._home([p.data for p in weights])
        _point(weights, self.offloaded[index].tensors)
        self._memory = []  # slots are as large as the largest block
        self._arrange([])

    def _before_state_dict(self, block: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.end_pass()  # a state dict outlives the pass that was interrupted

    def _before_load(self, index: int, block: nn.Module, *_: Any) -> None:
        self.end_pass()
        self.make_writable(index)

    def _after_load(self, index: int, block: nn.Module, *_: Any) -> None:
        self._written(index)


def _versions_of(parameters: Iterable[nn.Parameter]) -> list[int]:
    return [version_counter(parameter) for parameter in parameters]


def _mergeable(block: nn.Module) -> list[nn.Module]:
    """The layers of peft, which merge adapters into a weight's ``data``: torch does not count that."""
    return [module for module in block.modules() if hasattr(type(module), "merge") and hasattr(type(module), "unmerge")]


def _point(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor


def _tensors_with_gradient(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.requires_grad:
            yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors_with_gradient(value)
    elif isinstance(values, dict):
        yield from _tensors_with_gradient(list(values.values()))


def _in_several_places(blocks: Sequence[nn.Module]) -> set[int]:
    """Parameters that several blocks share; they stay on the device."""
    seen: set[int] = set()
    shared: set[int] = set()
    for block in blocks:
        here = {id(p) for p in block.parameters()}
        shared |= seen & here
        seen |= here
    return shared


def offloader_for(blocks: Iterable[nn.Module], settings: Mapping[str, Any], disk: Disk | None = None) -> BlockOffloader | None:
    """Returns the window that a module's settings ask for; None where frozen blocks stay on the device as they are.

    Args:
        blocks: The decoder blocks, first block first.
        settings: ``frozen_in``, ``frozen_dtype``, ``window_blocks`` and ``lora``, see ``CausalLMModule``.
        disk: Where the blocks wait, for ``frozen_in: disk``.
    """
    where, dtype = settings["frozen_in"], settings["frozen_dtype"]
    if where == "device" and dtype is None:
        return None
    only = settings["lora"] is not None
    return BlockOffloader(
        blocks, settings["window_blocks"], frozen_only=only, disk=disk, int8_in=where if dtype == "int8" else None
    )
