"""From one device's memory to that of each of several, and the bytes that they send each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ows_lightning.memory.settings import PlanSettings
from ows_lightning.memory.simulated_step import StepMemory, TrainingMethod
from ows_lightning.models.decoder import decoder_layers


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
