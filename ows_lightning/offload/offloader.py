"""The offloader: keeps frozen blocks off the device, and brings each into a slot there when it computes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ows_lightning.compat import version_counter
from ows_lightning.offload.access_hooks import add_access_hooks
from ows_lightning.offload.compute_hooks import ComputeHooks
from ows_lightning.offload.disk import Disk, DiskWeights
from ows_lightning.offload.fetch_schedule import FetchSchedule
from ows_lightning.offload.int8 import Int8Weights
from ows_lightning.offload.offloaded import OffloadedWeights, offload_to_host, total_nbytes, views_into
from ows_lightning.offload.streams import CopyStream, copy_stream_for
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.linear import ProjectedLinear, set_updates
from ows_lightning.optim.projected_adamw import merge_update_


class BlockOffloader:
    """Keeps the frozen decoder blocks of a model off the device (in host memory, on a disk, in int8), but computes on it.

    A block's parameters stay where they are in the model; what changes is their ``data``: the offloaded weights while the
    block is frozen, views of a slot while the frozen block computes, and memory of its own on the device while the block
    trains (any of its parameters requires a gradient). So every optimizer, checkpoint and export sees ordinary parameters.
    Without int8, no bit of what is computed changes. `FetchSchedule` decides what is fetched when, `ComputeHooks` tell it what
    computes, and `add_access_hooks` lets state dicts, ``to`` and peft find the weights.

    Weights are offloaded and slots allocated at first use, for the device that ``set_device`` named last. Deep copies and
    pickles of the model are independent of it. With `attach_optimizer`, frozen blocks that train at rest stay offloaded, and
    compute with W + B Q^T. With copies in int8, frozen blocks compute with rounded weights; what trains and is saved is exact.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],  # decoder blocks, first block first
        num_slots: int = 2,  # blocks that fit on the device at a time, at least 2
        frozen_only: bool = False,  # leave on the device what trains now: adapters
        disk: Disk | None = None,  # offload to it, not to host memory
        int8_in: str | None = None,  # makes int8 copies: on the ``device``, or beside the exact weights (``host``, ``disk``)
    ) -> None:
        self.blocks, self.num_slots = list(blocks), num_slots
        self.device = torch.device("cpu")
        self.saves_updates_separately = False  # a state dict leaves what is learned at rest to the optimizer's state
        self.was_copied = False  # there is another copy of the model, with which weights may be exchanged
        self._disk, self._int8_in = disk, int8_in
        self._optimizer: ref[GaLoreAdamW] | None = None
        blocks_of = Counter(p for block in self.blocks for p in block.parameters())  # what several share stays on the device
        self.parameters = [
            [p for p in block.parameters() if p.numel() and blocks_of[p] == 1 and not (frozen_only and p.requires_grad)]
            for block in self.blocks
        ]
        self._clear()
        ComputeHooks(self)
        add_access_hooks(self)
        if disk is not None and int8_in is None:  # int8 copies wait for the device that they are made for
            self.prepare()  # what is in memory goes to the disk at once

    def _clear(self) -> None:
        self.offloaded: list[OffloadedWeights] = []
        self.schedule = FetchSchedule(self, self.num_slots)
        self.layout_id = object()  # of blocks in slots; another one after every change
        self.slots: list[Tensor] = []
        self._views: dict[int, list[Tensor]] = {}  # of a slot, that an offloaded block's parameters get
        self._stream = CopyStream()
        self._fetches_exact = False  # also where there are copies in int8
        self._staging: Tensor | None = None  # that int8 copies pass through, one at a time; as large as the largest of them
        self._versions: dict[int, list[int]] = {}  # of an offloaded block's parameters, when they were last read
        self._slot_updates: dict[int, list[Any]] = {}  # by slot: the resting updates that its weights include
        self._updated_layers: dict[int, Iterable[ProjectedLinear]] = {}  # by block on the device: those that have an update

    def __getstate__(self) -> dict[str, Any]:
        """A copy has all weights in its own parameters, in host memory, with what they learned at rest merged in."""
        self.merge_updates()
        for index in range(len(self.offloaded)):
            self.make_writable(index)  # weight averaging copies a model, and exchanges weights with the copy later
        self.was_copied = True
        kept = ("blocks", "num_slots", "device", "saves_updates_separately", "was_copied", "parameters", "_int8_in")
        return {key: getattr(self, key) for key in kept} | {"_disk": None, "_optimizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clear()

    @property
    def active(self) -> list[int]:
        """The blocks that train, which have memory of their own on the device."""
        return [i for i in range(len(self.blocks)) if not self.schedule.is_offloaded(i)] if self.offloaded else []

    def apply_draw(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Gives the blocks that train now memory of their own on the device, and offloads those that no longer do.

        Call it after a draw. Without, the next forward pass that records a gradient does it.
        The ``optimizers``' state of these blocks moves to the device, too: a checkpoint may be loaded before the draw.
        """
        own = self.optimizer
        training = [any(p.requires_grad and not (own and own.is_resting(p)) for p in weights) for weights in self.parameters]
        active = [index for index, trains in enumerate(training) if trains]
        if not self.slots or active != self.active:
            self._set_active(active)
            self.schedule.fetch_first()
        for optimizer in optimizers:
            kept = {"rest"} if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else {"rest", "step"}
            for state in (optimizer.state.get(p, {}) for weights in self.parameters for p in weights):
                for key, value in state.items():
                    if isinstance(value, Tensor) and key not in kept and value.device != self.device:
                        state[key] = value.to(self.device)

    def set_device(self, device: torch.device) -> None:
        """Sets the device that computes."""
        device = torch.empty(0, device=device).device  # `cuda` is the current card
        if device == self.device:
            self.schedule.invalidate()
            return
        if self.offloaded:
            before = self.offloaded  # fetches read from it until they are over
            self.offloaded = [getattr(weights, "exact", weights) for weights in before]  # makes no more copies in int8
            self._move_blocks([])
        self.device = device
        self._clear()

    def prepare(self) -> None:
        """Offloads the blocks, if they are not yet."""
        if not self.slots:
            self._set_active(self.active)

    @contextmanager
    def on_device(self, block: nn.Module) -> Iterator[None]:
        """Keeps a block on the device while its weights are looked at outside a forward pass."""
        index = self.blocks.index(block)
        self.prepare()
        if not self.schedule.is_offloaded(index):
            yield
            return
        self.end_pass()
        self.schedule.enter(index)
        self._apply_updates(index, self.schedule.slot_of(index), in_layers=False)
        try:
            yield
        finally:
            self.schedule.release_all()

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Computes with the blocks' own weights, also where their copies in int8 would be fetched."""
        self._fetches_exact = True
        self.schedule.invalidate()
        try:
            yield
        finally:
            self._fetches_exact = False
            self.schedule.invalidate()

    @property
    def optimizer(self) -> GaLoreAdamW | None:
        """The attached optimizer, while it is alive."""
        return None if self._optimizer is None else self._optimizer()

    def attach_optimizer(self, optimizer: GaLoreAdamW) -> None:
        """Lets offloaded blocks train at rest: what they learn, the optimizer keeps beside their weights."""
        self._optimizer = ref(optimizer)
        optimizer.keep_updates_separate([p for weights in self.parameters for p in weights], self._merge_into_offloaded)
        # Weight averaging reads whole weights after each step, whoever takes it.
        optimizer.register_step_post_hook(lambda *_: self.merge_updates() if self.was_copied else None)

    def detach_optimizer(self) -> None:
        """Ends what `attach_optimizer` began, with what was learned merged: the next optimizer may be of another kind."""
        self.merge_updates()
        self._optimizer = None

    def merge_updates(self) -> None:
        """Writes what offloaded blocks have learned at rest into their weights; they go on resting."""
        if (optimizer := self.optimizer) is not None:
            optimizer.merge_updates()

    @torch.no_grad()
    def _merge_into_offloaded(self, weights: Sequence[Tensor]) -> None:
        """Writes what weights have learned at rest into them, W + B Q^T, where they are offloaded."""
        merged = set(weights)
        self.prepare()
        self.end_pass()
        self._drain_fetches()
        for index in range(len(self.blocks)):
            learned = merged & self._updates_of(index).keys()
            if learned and (optimizer := self.optimizer) is not None:
                with torch.inference_mode(False):  # else its weights could not train later
                    if offloaded := self.schedule.is_offloaded(index):
                        self._load_for_training(index)
                    optimizer.add_resting_updates(learned)
                    if offloaded:
                        self._offload_trained(index)
                self.layout_id = object()  # a backward that is to come would add the updates once more
        self._stream.wait_for_computation()  # which has written offloaded weights

    def _updates_of(self, block: int) -> dict[Tensor, tuple[Tensor, Tensor]]:
        return {} if (optimizer := self.optimizer) is None else optimizer.resting_updates(self.parameters[block])

    @torch.no_grad()
    def _apply_updates(self, block: int, slot: int, in_layers: bool = True) -> None:
        """Adds what a block has learned at rest: in its linear layers, or in its slot, once for every fetch."""
        self._reset_layers(block)
        updates = self._updates_of(block)
        if updates and in_layers:
            self._updated_layers[block] = layers = set_updates(self.blocks[block], updates)
            for p in set(layers.values()):
                del updates[p]
        added = [(block, id(update), version_counter(update)) for update, _ in updates.values()]
        before = self._slot_updates.get(slot, [])
        if added == before:
            return
        if before:  # of an earlier step: the weights themselves are needed again
            self._stream.release(slot)  # the fetch has to wait: earlier updates were just written into this slot
            self.issue(block, slot)
            self._stream.wait(slot)
        self._slot_updates[slot] = [None]  # until all are added: after an error the weights are needed again
        for p, (update, projector) in updates.items():
            merge_update_(p.data, update, projector)
        self._slot_updates[slot] = added

    def _reset_layers(self, block: int) -> None:
        for layer in self._updated_layers.pop(block, ()):
            layer.update = None

    def end_pass(self) -> None:
        """Ends a pass, even an interrupted one: parameters are offloaded weights again, with all that was written into them.

        torch counts in-place writes to them. Code that writes in another way (``p.data``) calls `make_writable` and `refresh`.
        """
        self.schedule.release_all()
        changed = [index for index, versions in self._versions.items() if versions != _versions_of(self.parameters[index])]
        for act in (self.make_writable, self.refresh):  # one after the other: refreshing drops pages that were written to
            for index in changed:
                act(index)

    def make_writable(self, index: int) -> None:
        """Prepares a block's weights for writes: empties the slots, moves weights in the model's file to the scratch file."""
        self.prepare()
        self._drain_fetches()
        self.offloaded[index].make_writable()
        if self.schedule.is_offloaded(index):
            _set_data(self.parameters[index], self.offloaded[index].tensors)

    def refresh(self, index: int, *_: Any) -> None:
        """Makes what was written into a block's offloaded weights count, from the next fetch on."""
        if self.schedule.is_offloaded(index):
            self._drain_fetches()
            self.offloaded[index].refresh()
            self._versions[index] = _versions_of(self.parameters[index])

    def refresh_all(self) -> None:
        """As `refresh`, for all blocks: averaging swaps weights with its copy's between training and evaluation."""
        for index in self.schedule.order:
            self.refresh(index)

    @torch.no_grad()
    def convert(self, index: int, fn: Callable[[Tensor], Tensor]) -> None:
        """Gives a block's weights another dtype; blocks that train get memory on the device again when it is needed."""
        self._set_active([])
        self.offloaded[index] = self._offload([fn(p.data).to("cpu") for p in self.parameters[index]])
        _set_data(self.parameters[index], self.offloaded[index].tensors)
        self.slots = []  # they are as large as the largest block
        self._set_active([])

    @torch.no_grad()
    def _set_active(self, active: Sequence[int]) -> None:
        """Gives these blocks memory of their own on the device, to train in, and offloads the others."""
        with torch.inference_mode(False):  # what is made within inference mode can't be saved for backward
            self._move_blocks(active)
            if not self.slots:  # made once: they stay for as long as the offloader is on this device
                size = max(total_nbytes(weights.tensors) for weights in self.offloaded)
                self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(self.num_slots)]
                self._stream = copy_stream_for(self.device, self.num_slots, self._disk is not None)
            self._stream.wait_for_computation()  # it has written offloaded weights, and had the slots' memory
            offloaded, self.layout_id = self.schedule.order, object()
            self._versions = {i: _versions_of(self.parameters[i]) for i in offloaded}
            self._views = {i: views_into(self.slots[self.schedule.slot_of(i)], self.offloaded[i].tensors) for i in offloaded}

    @torch.no_grad()
    def _move_blocks(self, active: Sequence[int]) -> None:
        """Moves blocks one by one, each of which counts at once: memory may run out at any of them."""
        self.end_pass()
        self._drain_fetches()
        before = self.active
        if not self.offloaded:
            self._offload_all()
        for index in set(before) - set(active):  # first, so that their memory can be used again
            self._offload_trained(index)
        on_device = set(before) & set(active)
        self._schedule_all_except(on_device)
        for index in sorted(set(active) - set(before)):
            self._load_for_training(index)
            on_device.add(index)
            self._schedule_all_except(on_device)

    def _schedule_all_except(self, on_device: Collection[int]) -> None:
        self.schedule.set_blocks([i for i, weights in enumerate(self.parameters) if weights and i not in on_device])

    def _offload_all(self) -> None:
        if self._int8_in not in (None, "device"):
            self._staging = torch.empty(0, dtype=torch.uint8, device=self.device)
        offloaded = []
        for parameters in self.parameters:
            offloaded.append(self._offload([p.data for p in parameters]))
            _set_data(parameters, offloaded[-1].tensors)
        self.offloaded = offloaded

    def _load_for_training(self, index: int) -> None:
        """Gives a block that begins to train memory of its own on the device."""
        own = [torch.empty_like(weight, device=self.device) for weight in self.offloaded[index].tensors]
        self.offloaded[index].load_for_training(own)
        _set_data(self.parameters[index], own)

    def _offload_trained(self, index: int) -> None:
        self.offloaded[index].write_back([p.data for p in self.parameters[index]])
        _set_data(self.parameters[index], self.offloaded[index].tensors)

    def _offload(self, weights: Sequence[Tensor]) -> OffloadedWeights:
        disk, copied = self._disk, self.was_copied  # what is copied may be exchanged with its copy
        offload = partial(DiskWeights, disk, writable=copied) if disk else partial(offload_to_host, device=self.device)
        if self._int8_in is None:
            return offload(weights)
        offload_copy = partial(OffloadedWeights, device=self.device) if self._int8_in == "device" else offload
        return Int8Weights(offload(weights), offload_copy, self._staging)

    def _drain_fetches(self) -> None:
        """Drops what the slots hold, and waits until no fetch runs: what one reads or writes may be written or freed then."""
        self.schedule.invalidate()
        self._stream.synchronize()

    def issue(self, block: int, slot: int) -> None:
        """Starts to fetch a block: when ``fetch`` is done, the weights in the slot are complete."""
        self._slot_updates.pop(slot, None)
        self._stream.issue(slot, partial(self.offloaded[block].fetch, self._views[block], self._fetches_exact))

    def wait(self, block: int, slot: int) -> None:
        """Lets a block's parameters be the slot, once the block has arrived."""
        self._stream.wait(slot)
        _set_data(self.parameters[block], self._views[block])
        self._apply_updates(block, slot)

    def release(self, block: int, slot: int) -> None:
        """Lets a block's parameters be its offloaded weights again, and the slot be written."""
        self._reset_layers(block)
        _set_data(self.parameters[block], self.offloaded[block].tensors)
        self._stream.release(slot)


def _versions_of(parameters: Iterable[nn.Parameter]) -> list[int]:
    return [version_counter(parameter) for parameter in parameters]


def _set_data(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
