"""How a causal LM is sharded by FSDP2: one unit a decoder block, and one for what lies around them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ows_lightning.sampling.decoder import decoder_layers


def shard_model(model: nn.Module, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shards a model's parameters over the processes of a mesh, in place.

    Args:
        model: A causal LM, or a peft model around one; its parameters are replaced by DTensors.
        mesh: The processes, one-dimensional.
        precision: The Trainer's; with ``bf16-true`` and ``bf16-mixed``, weights are gathered in bfloat16 and gradients are
            added up over the processes in float32.
    """

    def placement(weight: nn.Parameter) -> Shard | None:
        """Wide matrices are projected from the left: with their columns sharded, projecting needs no communication."""
        if weight.dim() == 2 and weight.size(0) < weight.size(1) and weight.size(1) % mesh.size() == 0:
            return Shard(1)
        return None  # rows

    policy = MixedPrecisionPolicy()
    if precision.startswith("bf16"):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    # Resharding, too, after a forward pass: parameters that stay gathered would not see that they were frozen.
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=True)
