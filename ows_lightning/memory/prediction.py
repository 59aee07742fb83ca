"""Predicts a training step's peak memory: of a config's method, and of what one would use instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ows_lightning.errors import UsageError
from ows_lightning.memory.fake_tensors import FakeOperators, first_blocks, materialize_
from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.simulated_step import StepMemory, TrainingMethod, Workload, block_groups, follow_steps
from ows_lightning.memory.tracker import MemoryTracker
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import checkpoint_activations
from ows_lightning.optim.galore import GaLoreAdamW

_STAGING = 2  # page-locked buffers of a weight each through which a GPU reads a disk


@dataclass(frozen=True)
class BlockSizes:
    """A model's blocks in bytes: the number of them, the largest one as it trains and as it waits, and its largest weight."""

    count: int
    trains: int
    waits: int
    weight: int

    @classmethod
    def of(cls, model: nn.Module, settings: PlanSettings) -> BlockSizes:
        """Returns those of a causal LM, or of its copy on the meta device."""
        layers = decoder_layers(model)
        trains = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
        waits = trains
        if settings.frozen_dtype == "int8":  # a byte a weight and a float32 scale an output row; the rest as it is
            waits = max(sum(_int8(p) for p in layer.parameters()) for layer in layers)
        return cls(len(layers), trains, waits, max(p.nbytes for layer in layers for p in layer.parameters()))


def _int8(p: nn.Parameter) -> int:
    return p.numel() + 4 * (p.numel() // p.size(-1)) if p.dim() > 1 else p.nbytes


def waiting_blocks(settings: PlanSettings, method: TrainingMethod, count: int) -> int:
    """How many of the blocks wait at a time: those that are frozen, and under LoRA all; none for other tools' methods."""
    if not method.ours or (settings.frozen_in == "device" and settings.frozen_dtype is None):
        return 0
    if method.lora is not None:
        return count
    return 0 if method.activated_layers is None else max(0, count - method.activated_layers)


def device_bytes(weights: int, settings: PlanSettings, method: TrainingMethod, blocks: BlockSizes) -> int:
    """Turns the weights of a whole model into what of them is on the device.

    Blocks that train, embeddings, head and norm stay as they are; of those that wait there is a window. Blocks in int8 are
    dequantised into the window, from copies on the device or from memory that the copies pass through one by one.
    """
    waiting = waiting_blocks(settings, method, blocks.count)
    if not waiting:
        return weights
    window = min(settings.window_blocks, waiting)
    held = waiting if settings.frozen_in == "device" else int(settings.frozen_dtype == "int8")
    return weights - waiting * blocks.trains + window * blocks.trains + held * blocks.waits


def resident_weights(settings: PlanSettings) -> int:
    """Bytes of weights that lie on the device for sure: all, unless some wait elsewhere or are shared between devices."""
    if settings.frozen_in != "device" or settings.frozen_dtype is not None or settings.devices > 1:
        return 0
    return sum(p.nbytes for p in settings.meta_model.parameters())


def host_bytes(settings: PlanSettings, method: TrainingMethod, blocks: BlockSizes) -> int:
    """What waits in host memory: every block's home, in int8 its master and its copy; from a disk, staging buffers alone."""
    if not waiting_blocks(settings, method, blocks.count):
        return 0
    if settings.frozen_in == "disk":
        return _STAGING * blocks.weight if settings.on_gpu else 0
    copies = blocks.waits if settings.frozen_dtype == "int8" and settings.frozen_in == "host" else 0
    return blocks.count * (blocks.trains + copies)


def fetched_blocks(draw: Sequence[int], settings: PlanSettings, method: TrainingMethod, count: int) -> int:
    """How many blocks are fetched in a micro-batch: at the least that is possible, the first after a draw excepted.

    Forward fetches all R that wait, backward the B of them that it reaches. The last of forward's are there when backward
    begins, and so may be the first of forward's when it ends, as far as the window goes.
    """
    if settings.frozen_in == "device":
        return 0
    waiting = waiting_blocks(settings, method, count)
    below = 0 if "embeddings" in method.always_train or method.lora is not None else min(draw)
    reached = waiting - below
    window = min(settings.window_blocks, waiting)
    last = max(reached, window)  # where in the order of waiting blocks the window ends up
    return waiting + reached - min(window, reached) - max(0, window - (waiting - last))


@dataclass(frozen=True)
class Shards:
    """A model's units of sharding: the number of its blocks, and the parameters of a block and of all else, the root."""

    blocks: int
    block: int
    root: int

    @classmethod
    def of(cls, model: nn.Module) -> Shards:
        """Returns those of a causal LM."""
        layers = decoder_layers(model)
        block, whole = (sum(p.numel() for p in module.parameters()) for module in (layers[0], model))
        return cls(len(layers), block, whole - len(layers) * block)


def is_sharded(settings: PlanSettings) -> bool:
    """Whether each device holds a part of the weights."""
    return settings.devices > 1 and "fsdp" in (settings.strategy or "")


def on_each_device(peak: dict[str, int], settings: PlanSettings, shards: Shards, method: TrainingMethod) -> dict[str, int]:
    """Turns the peak of one device into that of each of n.

    FSDP2 shards weights, gradients, moments and an elementwise optimizer's temporaries n ways. Beside its shards, a device
    holds the root's weights, those of two blocks (one at work, one that is fetched meanwhile) and, where full gradients exist,
    those of two blocks (one being produced, one being reduced). Projectors are replicated; activations are those of the
    device's own rows. With DDP, every device holds everything.
    """
    if not is_sharded(settings):
        return peak
    split = {"weights", "gradients", "moments"} | ({"other"} if method.rank is None else set())
    sizes = {name: -(-size // settings.devices) if name in split else size for name, size in peak.items()}
    sizes["weights"] += (shards.root + 2 * shards.block) * settings.compute_dtype.itemsize
    if method.lora is None:
        sizes["gradients"] += 2 * shards.block * settings.compute_dtype.itemsize
    return sizes


def communicated_bytes(memory: StepMemory, settings: PlanSettings, shards: Shards, method: TrainingMethod) -> int:
    """Bytes that each of n devices sends in an optimizer step; its share in a ring is (n - 1) / n of the tensors.

    FSDP2: in every micro-batch, the blocks' weights are gathered in forward and again in backward, frozen ones too, and the
    root's once; gradients of what trains, and only those, are reduced and scattered in float32. DDP: once a step, gradients
    are reduced and gathered, and of a projected matrix only the projected one.
    """
    n = settings.devices
    if is_sharded(settings):
        gathered = (2 * shards.blocks * shards.block + shards.root) * settings.compute_dtype.itemsize
        return settings.accumulate_grad_batches * (gathered + 4 * memory.trained) * (n - 1) // n
    reduced = memory.consumed if method.ours else memory.trained * settings.dtype.itemsize
    return 2 * reduced * (n - 1) // n


CATEGORIES = ("weights", "gradients", "moments", "projectors", "activations", "loss_head", "other")

_CUDA_BLOCK = 512  # bytes: what CUDA's caching allocator rounds to
_FEW = 3  # blocks of a kind that are followed one by one; more are extrapolated
_followed: WeakKeyDictionary[nn.Module, dict[Any, StepMemory]] = WeakKeyDictionary()  # by the whole model


@dataclass(frozen=True)
class MethodPlan:
    """What a method needs on each device.

    Attributes:
        bytes: Category -> bytes at the peak, see `CATEGORIES`.
        communicated_bytes: Bytes that each device sends in an optimizer step.
        host_bytes: Bytes of frozen blocks in host memory.
    """

    bytes: dict[str, int]
    communicated_bytes: int = 0
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most memory that is allocated at a time."""
        return sum(self.bytes.values())

    def fits(self, card: int) -> bool:
        """Whether it fits a card of so many GB."""
        return self.peak_bytes <= card * 1e9


def _adamw(settings: PlanSettings) -> Callable[[Any], Optimizer]:
    return partial(AdamW, foreach=settings.on_gpu)  # what it does by default there


def _galore(settings: PlanSettings) -> Callable[[Any], Optimizer]:
    # galore-torch's moments have the gradient's dtype.
    return partial(GaLoreAdamW, moments_dtype="bfloat16" if settings.dtype == torch.bfloat16 else "float32")


METHODS: dict[str, Callable[[PlanSettings], TrainingMethod]] = {
    "ows": lambda settings: settings.method,
    "full": lambda settings: TrainingMethod(_adamw(settings)),
    "lora": lambda settings: TrainingMethod(_adamw(settings), lora={"r": 16, "target_modules": "all-linear"}),
    "galore": lambda settings: TrainingMethod(_galore(settings), rank=settings.method.rank or 128, subspace="svd"),
    "lisa": lambda settings: TrainingMethod(_adamw(settings), activated_layers=2, states_kept=True, distribution="uniform"),
    "ows_published": lambda settings: TrainingMethod(
        _galore(settings), activated_layers=5, rank=settings.method.rank or 128, subspace="svd", states_kept=True
    ),
}
"""``ows`` is the config's own method in this package. The others are what one would use instead, as their own tools run them:
torch's AdamW, peft with r = 16, galore-torch, LISA with gamma = 2, and OWS' reference code. The last two keep the states of
blocks that are frozen again. Batches, precision and checkpointing are the config's."""


def predict(settings: PlanSettings, method: TrainingMethod | None = None) -> MethodPlan:
    """Predicts what a method needs on each device, from a step of a fake model with all its operators.

    A step is followed on a model of few blocks. Blocks of a kind add the same each, so that the peaks of each stage of a step
    are linear in the number of blocks of each kind (see `block_groups`); the rest is extrapolated, exactly. The highest of the
    stages is the peak. Kernels' workspaces (cuBLAS, say) are not in it.

    On several devices, see `on_each_device`.

    Args:
        settings: The model and what it is trained on.
        method: Another method than the settings' own.

    Raises:
        UsageError: The model has operators that can't be followed without data.
    """
    method = method or settings.method
    model = settings.meta_model
    layers = decoder_layers(model)
    active = len(layers) if method.activated_layers is None else min(method.activated_layers, len(layers))
    try:
        followed = partial(follow, model, settings, method)
        memory = _extrapolate(followed, active, len(layers) - active, settings.recomputed, alike(layers))
    except UsageError:
        raise
    except Exception as error:  # what a model's code raises when its tensors have no contents
        raise UsageError(
            f"model.model_name_or_path: can't follow a {settings.model.model_type} model in {settings.precision} ({error})"
        ) from error
    shards = Shards.of(model)
    blocks = BlockSizes.of(model, settings)
    for peak in memory.peaks.values():
        peak["weights"] = device_bytes(peak["weights"], settings, method, blocks)
    peaks = [on_each_device(peak, settings, shards, method) for peak in memory.peaks.values()]
    highest = max(peaks, key=lambda sizes: sum(sizes.values()))
    return MethodPlan(highest, communicated_bytes(memory, settings, shards, method), host_bytes(settings, method, blocks))


def follow(
    model: nn.Module,
    settings: PlanSettings,
    method: TrainingMethod,
    active: int,
    frozen: int,
    recomputed: int,
    rows: int | None = None,
) -> StepMemory:
    """Follows a step of a fake copy of a meta model.

    Args:
        model: The whole model.
        settings: What it is trained on.
        method: How it trains.
        active: How many of the copy's blocks train.
        frozen: How many more it has.
        recomputed: How many of them, from below, recompute their activations.
        rows: Rows of a micro-batch, of which every chunk is followed, as counting asks for; None: those of the settings, and
            as much of their chunks as memory depends on.
    """
    if method.activated_layers is not None:
        method = replace(method, activated_layers=active)
    work = Workload(
        rows or settings.batch_size,
        settings.max_seq_length,
        settings.accumulate_grad_batches > 1 and rows is None,
        settings.autocast,
        host_memory=settings.on_gpu,
    )
    known = _followed.setdefault(model, {})
    key = method, work, active + frozen, recomputed, rows is None
    if key not in known:  # a card's advice asks for the same step with frozen blocks here and there
        few = first_blocks(model, active + frozen)
        checkpoint_activations(few, recomputed)  # type: ignore[arg-type]
        if method.lora is not None:
            few = _add_lora(few, method.lora)
        tracker = MemoryTracker(_CUDA_BLOCK if settings.on_gpu else 1, FakeOperators(abridged=rows is None))
        with tracker:
            materialize_(few)
        known[key] = follow_steps(few, method, work, tracker)
    return known[key]


def _add_lora(model: nn.Module, lora: dict[str, Any]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError('lora: needs peft; pip install "ows_lightning[lora]"') from error
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), low_cpu_mem_usage=True)


def alike(layers: nn.ModuleList) -> bool:
    """Whether all blocks have the same weights by name and shape."""
    return len({tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}) == 1


def _extrapolate(
    follow: Callable[[int, int, int], StepMemory], active: int, frozen: int, recomputed: int, alike: bool
) -> StepMemory:
    """Follows small models and goes on linearly, in blocks of each kind."""
    sizes = block_groups(active, frozen, recomputed)
    few = {kind: size if size <= _FEW or not alike else 2 for kind, size in sizes.items()}

    def of(sizes: dict[str, int]) -> StepMemory:
        frozen, frozen_kept, active, active_kept = sizes.values()
        return follow(1 + active + active_kept, frozen + frozen_kept, min(recomputed, 1 + frozen + active))

    base = of(few)
    steps = [(size - few[kind], of({**few, kind: few[kind] + 1})) for kind, size in sizes.items() if size > few[kind]]

    def extended(value: Callable[[StepMemory], int]) -> int:
        return value(base) + sum(times * (value(further) - value(base)) for times, further in steps)

    def at(span: tuple[Any, ...], category: str, memory: StepMemory) -> int:
        return memory.peaks[span].get(category, 0)

    return StepMemory(
        {span: {name: extended(partial(at, span, name)) for name in CATEGORIES} for span in base.peaks},
        extended(lambda memory: memory.trained),
        extended(lambda memory: memory.consumed),
    )
