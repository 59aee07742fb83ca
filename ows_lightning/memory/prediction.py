"""Predicts a training step's peak memory: of a config's method, and of what one would use instead."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ows_lightning.errors import UsageError
from ows_lightning.memory.fake_tensors import FakeOperators, to_fake_
from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.simulated_step import StepCosts, TrainingMethod, Workload, block_groups, simulate_steps
from ows_lightning.memory.tracker import MemoryTracker
from ows_lightning.models.decoder import decoder_layers, is_matrix, language_model_of
from ows_lightning.models.execution import checkpoint_activations
from ows_lightning.models.lora import add_lora
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.activation import non_block_trains

CATEGORIES = ("weights", "gradients", "moments", "projectors", "activations", "loss_head", "other")
CONTEXT_BYTES = 10**9  # of a GPU's nominal memory: CUDA's context, workspaces, and up to 2 % that some cards lack
_CUDA_BLOCK = 512  # bytes: what CUDA's caching allocator rounds to
_MAX_SIMULATED = 3  # blocks of a group that are simulated one by one; more are extrapolated
_STAGING = 2  # page-locked buffers of a weight each through which a GPU reads a disk


@dataclass(frozen=True)
class MemoryPrediction:
    """What a method needs on each device."""

    bytes: dict[str, int]  # category -> those at the peak, see `CATEGORIES`
    host_bytes: int = 0  # in host memory: of frozen blocks, and of gradients that wait there
    communicated_bytes: int = 0  # that each device sends in an optimizer step

    @property
    def peak_bytes(self) -> int:
        """The most memory that is allocated at a time."""
        return sum(self.bytes.values())

    def fits(self, gigabytes: int) -> bool:
        """Whether it fits a card of so many ``gigabytes``, beside CUDA's context and workspaces."""
        return self.peak_bytes <= gigabytes * 1e9 - CONTEXT_BYTES


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
    "lisa": lambda settings: TrainingMethod(_adamw(settings), activated_layers=2, keeps_states=True, distribution="uniform"),
    "ows_published": lambda settings: TrainingMethod(
        _galore(settings), activated_layers=5, rank=settings.method.rank or 128, subspace="svd", keeps_states=True
    ),
}
"""``ows`` is the config's own method in this package. The others are what one would use instead, as their own tools run them:
torch's AdamW, peft with r = 16, galore-torch, LISA with gamma = 2, and OWS' reference code. The last two keep the states of
blocks that are frozen again. Batches, precision and checkpointing are the config's."""


@torch.random.fork_rng(devices=[])
def predict_memory(settings: PlanSettings) -> MemoryPrediction:
    """Predicts what the settings' method needs on each device, from a step of a fake model with all its operators.

    The highest of a step's stages is the peak. Kernels' workspaces (cuBLAS, say) are not in it. It raises a UsageError if the
    model has operators that can't be followed without data.
    """
    try:
        memory = extrapolate(settings, blocks_are_alike(settings))
    except UsageError:
        raise
    except Exception as error:  # what a model's code raises when its tensors have no contents
        kind = f"a {settings.model_config.model_type} model in {settings.precision}"
        raise UsageError(f"model.model_name_or_path: can't follow {kind} ({error})") from error
    sizes = ModelSizes.of(settings)
    device, host = _offloaded_bytes(settings, sizes)
    peaks = [{**peak, "weights": peak["weights"] + device} for peak in memory.peaks.values()]
    if settings.is_sharded:
        peaks = [_per_device_peak(span[-1], peak, settings, sizes) for span, peak in zip(memory.peaks, peaks, strict=True)]
    highest = max(peaks, key=lambda peak: sum(peak.values()))
    return MemoryPrediction(highest, host + _waiting_gradients(settings), _communicated_bytes(memory, settings, sizes))


def extrapolate(settings: PlanSettings, alike: bool) -> StepCosts:
    """Simulates steps of models of few blocks, or of all blocks where these are not alike, and goes on linearly.

    Blocks of a group (see `block_groups`) add the same each, so that the peaks of each stage of a step are linear in the
    number of blocks of each group: it is exact.
    """
    active = settings.method.active_blocks(settings.num_blocks)
    groups = block_groups(active, settings.num_blocks - active, settings.num_checkpointed)
    few = {name: size if size <= _MAX_SIMULATED or not alike else 2 for name, size in groups.items()}

    def simulate_groups(groups: dict[str, int]) -> StepCosts:
        frozen, frozen_kept, active, active_kept = groups.values()
        num_checkpointed = min(settings.num_checkpointed, 1 + frozen + active)
        return simulate(settings, 1 + active + active_kept, frozen + frozen_kept, num_checkpointed)

    base, more = simulate_groups(few), {name: size - few[name] for name, size in groups.items() if size > few[name]}
    steps = [(times, simulate_groups({**few, name: few[name] + 1})) for name, times in more.items()]

    def extended(value: Callable[..., int], *key: Any) -> int:
        return value(base, *key) + sum(times * (value(further, *key) - value(base, *key)) for times, further in steps)

    peaks = {s: {n: extended(lambda m, s, n: m.peaks[s].get(n, 0), s, n) for n in CATEGORIES} for s in base.peaks}
    return StepCosts(peaks, extended(lambda memory: memory.trained), extended(lambda memory: memory.consumed))


def blocks_are_alike(settings: PlanSettings) -> bool:
    """Whether all blocks have the same weights by name and shape, adapters included."""
    lora = settings.method.lora

    def alike() -> bool:
        own = settings.meta_model
        model = own if lora is None else add_lora(copy.deepcopy(own), lora, low_cpu_mem_usage=True)
        return len({tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in decoder_layers(model)}) == 1

    return settings.cached(("alike", repr(lora)), alike)


def simulate(settings: PlanSettings, active: int, frozen: int, num_checkpointed: int, rows: int | None = None) -> StepCosts:
    """Simulates a step of a fake model of the settings' first blocks; the same step is simulated once.

    ``active`` and ``frozen`` are numbers of blocks; the lowest ``num_checkpointed`` recompute their activations. With
    ``rows``, it is a micro-batch of that many rows, for its FLOPs; with None, of the settings' rows, for its memory.
    """
    method = settings.method if settings.method.activated_layers is None else replace(settings.method, activated_layers=active)
    accumulates = settings.accumulate_grad_batches > 1 and rows is None
    length, offloads = settings.max_seq_length, settings.offloads and method.resting_rank > 0
    all_active = (settings.method.activated_layers or 0) >= settings.num_blocks
    renews = method.ours and rows is None and (all_active or settings.update_proj_gap <= settings.sampler.interval_steps)
    work = Workload(rows or settings.batch_size, length, accumulates, settings.autocast, settings.on_gpu, offloads, renews)

    def simulated() -> StepCosts:
        model = _first_blocks(settings.meta_model, active + frozen)
        if method.lora is not None:
            model = add_lora(model, method.lora, low_cpu_mem_usage=True)
        checkpoint_activations(language_model_of(model), num_checkpointed)  # type: ignore[arg-type]
        tracker = MemoryTracker(_CUDA_BLOCK if settings.on_gpu else 1, FakeOperators(merge_chunks=rows is not None))
        with tracker:
            to_fake_(model)
        return simulate_steps(model, method, work, tracker)

    # A card's advice asks for the same step with frozen blocks here and there.
    key = settings.dtype, settings.attention, method, work, active + frozen, num_checkpointed, rows
    return settings.cached(key, simulated)


def _first_blocks(model: nn.Module, count: int) -> nn.Module:
    """Returns a copy of a causal LM that has only its first blocks."""
    layers = decoder_layers(model)  # not by its config, where each architecture has its own words for kinds of blocks
    whole = list(layers)
    del layers[count:]
    try:
        return copy.deepcopy(model)
    finally:
        layers.extend(whole[count:])


class ModelSizes(NamedTuple):
    """The sizes of a model's blocks, the largest first, and of all else. What several blocks share counts as all else."""

    block_numel: list[int]  # parameters of each
    root_numel: int  # parameters of all else
    on_device: list[int]  # bytes of each block as it trains
    offloaded: list[int]  # bytes of each while it is offloaded, or in int8
    largest_weight: int  # bytes, of a block's

    @classmethod
    def of(cls, settings: PlanSettings) -> "ModelSizes":
        """Returns those of the settings' model."""
        layers = decoder_layers(settings.meta_model)
        blocks_of = Counter(p for layer in layers for p in layer.parameters())
        own = [[p for p in layer.parameters() if blocks_of[p] == 1] for layer in layers]
        own.sort(key=lambda layer: sum(p.nbytes for p in layer), reverse=True)
        blocks = [sum(p.numel() for p in layer) for layer in own]
        root = sum(p.numel() for p in settings.meta_model.parameters()) - sum(blocks)
        on_device = offloaded = [sum(p.nbytes for p in layer) for layer in own]
        if settings.frozen_dtype == "int8":  # a byte a weight and a float32 scale an output row; the rest as it is
            offloaded = [sum(p.numel() + 4 * p[..., 0].numel() if p.dim() > 1 else p.nbytes for p in layer) for layer in own]
        return cls(blocks, root, on_device, offloaded, max(p.nbytes for layer in own for p in layer))


def _offloaded_blocks(settings: PlanSettings) -> int | None:
    """How many blocks are offloaded or in int8: those that are frozen, under LoRA all; None for methods that offload none."""
    method, count = settings.method, settings.num_blocks
    if not method.ours or not settings.offloads:
        return None
    return count if method.lora is not None else count - method.active_blocks(count)


def _offloaded_bytes(settings: PlanSettings, sizes: ModelSizes) -> tuple[int, int]:
    """Bytes on the device beyond the whole model's weights (negative: fewer), and bytes in host memory.

    Blocks that train (the largest, where they differ), embeddings, head and norm stay as they are; for offloaded ones there
    are slots. Blocks in int8 are dequantised into the slots, from copies on the device or from memory that the copies pass
    through one by one. The host has every block's weights, in int8 exact ones and a copy; from a disk, staging buffers alone.
    """
    offloaded, is_int8 = _offloaded_blocks(settings), settings.frozen_dtype == "int8"
    if offloaded is None:
        return 0, 0
    frozen = slice(settings.num_blocks - offloaded, None)
    on_device = settings.window_blocks * sizes.on_device[0] - sum(sizes.on_device[frozen])
    if is_int8:
        on_device += sum(sizes.offloaded[frozen]) if settings.frozen_in == "device" else sizes.offloaded[0]
    if settings.frozen_in == "disk":
        return on_device, _STAGING * sizes.largest_weight if settings.on_gpu else 0
    return on_device, sum(sizes.on_device) + (sum(sizes.offloaded) if is_int8 and settings.frozen_in == "host" else 0)


def _waiting_gradients(settings: PlanSettings) -> int:
    """How many page-locked bytes, a power of two each, hold gradients that wait for a step's end or their average."""
    method, averages = settings.method, settings.devices > 1 and not settings.is_sharded
    waits = settings.on_gpu and (averages or settings.accumulate_grad_batches > 1)
    if method.rank is None or method.lora is not None or not (method.ours and waits):
        return 0
    largest = max(decoder_layers(settings.meta_model), key=lambda layer: sum(p.numel() for p in layer.parameters()))
    outside = non_block_trains(settings.meta_model, method.always_train if method.project_embeddings else ()).items()
    in_block = [p for name, p in largest.named_parameters() if is_matrix(name, p)]
    waiting = in_block * method.active_blocks(settings.num_blocks) + [p for p, trains in outside if trains]
    projected = (p for p in waiting if p.dim() in (2, 3) and min(p.shape[-2:]) > method.rank)
    sizes = (p.nbytes // (settings.devices if settings.is_sharded else 1) for p in projected)
    return sum(1 << (size - 1).bit_length() for size in sizes)


def fetched_blocks(draw: Sequence[int], settings: PlanSettings) -> int:
    """The fewest blocks that can be fetched in a micro-batch, the first one after a draw excepted.

    Forward fetches all R that are offloaded, backward the B of them that it reaches. The last of forward's are there when
    backward begins, and so may be the first of forward's when it ends, as far as there are slots.
    """
    if settings.frozen_in == "device":
        return 0
    offloaded = _offloaded_blocks(settings) or 0
    below = 0 if settings.embeddings_train or settings.method.lora is not None else min(draw)
    reached, slots = offloaded - below, min(settings.window_blocks, offloaded)
    last = max(reached, slots)  # where in the order of offloaded blocks the slots end up
    return offloaded + reached - min(slots, reached) - max(0, slots - (offloaded - last))


def _per_device_peak(stage: str, peak: dict[str, int], settings: PlanSettings, sizes: ModelSizes) -> dict[str, int]:
    """Turns the peak of one device, in a stage of a step, into that of each of n under FSDP2.

    Weights, gradients, moments and an elementwise optimizer's temporaries are sharded n ways; projectors are replicated, and
    activations are those of the device's own rows. In addition, a device holds (torch's ``_fsdp_param_group.py``)

    * in forward the root's weights and, while a block is copied from the buffer that it was gathered in, three blocks: that
      buffer and that of the block before (or of the root) are still there;
    * in backward two blocks, one at work and one that is gathered meanwhile, or at first the root twice; and full gradients of
      the root, of a block, and of another one that is reduced (from bfloat16 in float32).
    """
    sharded = {"weights", "gradients", "moments"} | ({"other"} if settings.method.rank is None else set())
    each = {name: -(-size // settings.devices) if name in sharded else size for name, size in peak.items()}
    dtype, method, backward = settings.compute_dtype, settings.method, stage.startswith("backward")
    root, block, of_blocks = sizes.root_numel * dtype.itemsize, sizes.block_numel[0] * dtype.itemsize, 0
    before = root if stage in ("forward", "forward lowest") else block
    gathered = {"step": 0, "loss_head": root + block}.get(stage, root + 2 * block + (0 if backward else before))
    if method.lora is None and (backward or stage == "loss_head"):
        outside = non_block_trains(settings.meta_model, method.always_train).items()
        of_root = sum(p.numel() for p, always in outside if always or method.activated_layers is None)
        each["gradients"] += of_root * dtype.itemsize * (settings.devices - 1) // settings.devices
    if method.lora is None and backward:
        of_blocks = (3 if dtype == torch.bfloat16 else 2) * block
        each["gradients"] += of_blocks
    each["weights"] += max(gathered, 2 * root - of_blocks) if backward else gathered  # of gradients there are none at first
    return each


def _communicated_bytes(memory: StepCosts, settings: PlanSettings, sizes: ModelSizes) -> int:
    """Bytes that each of n devices sends in an optimizer step; its share in a ring is (n - 1) / n of the tensors.

    FSDP2: in every micro-batch, the blocks' weights are gathered in forward and again in backward, frozen ones too, and the
    root's once; gradients of what trains, and only those, are reduced and scattered in float32. DDP: once a step, gradients
    are reduced and gathered, and of a projected matrix only the projected one.
    """
    n = settings.devices
    if settings.is_sharded:
        gathered = (2 * sum(sizes.block_numel) + sizes.root_numel) * settings.compute_dtype.itemsize
        return settings.accumulate_grad_batches * (gathered + 4 * memory.trained) * (n - 1) // n
    return 2 * (memory.consumed if settings.method.ours else memory.trained * settings.dtype.itemsize) * (n - 1) // n
