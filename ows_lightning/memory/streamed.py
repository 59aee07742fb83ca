"""Frozen blocks that wait outside the device: what the device and the host hold then, and what is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ows_lightning.memory.settings import PlanSettings
from ows_lightning.memory.simulated_step import TrainingMethod
from ows_lightning.models.decoder import decoder_layers

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
