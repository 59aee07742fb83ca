"""A model that is sharded by FSDP2, and loaded straight into its shards: no process holds all weights, or some twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ows_lightning.compat import local_shape_and_offset, replace_parameters_
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import check_finite, find_stored_weights, persistent_buffers


def shard_model(model: nn.Module, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shards a model's parameters over the processes of a one-dimensional mesh: they are replaced by DTensors.

    The model is a ``CausalLM``, or the causal LM that a module of your own holds, which is run by its forward alone. With the
    Trainer's ``bf16-true`` and ``bf16-mixed``, weights are gathered in bfloat16, and gradients are added up in float32.
    """

    def placement(weight: nn.Parameter) -> Shard | None:
        """Wide matrices are projected from the left: with their columns sharded, projecting needs no communication."""
        if weight.dim() == 2 and weight.size(0) < weight.size(1) and weight.size(1) % mesh.size() == 0:
            return Shard(1)
        return None  # rows

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision.startswith("bf16") else MixedPrecisionPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    # Resharding, too, after a forward pass: parameters that stay gathered would not see that they were frozen.
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=True)
    if isinstance(model, CausalLM):
        for name in model.forward_methods:
            register_fsdp_forward_method(model, name)


def load_into_shards(
    build: Callable[[bool], nn.Module], name: str, mesh: DeviceMesh, device: torch.device, precision: str
) -> CausalLM:
    """Builds a model, with its weights (``build(False)``) or without, shards it, see ``shard_model``, and fills the shards.

    From safetensors that name the model's weights as the model does, every process reads its own parts. Else (GGUF, experts
    that transformers fuses when it loads, added tokens, adapters) rank 0 loads the model and hands out a weight at a time.
    """
    model: Any = build(True)
    dtype = model.dtype  # also of weights that stay in float32 elsewhere, such as routers: FSDP takes one dtype in a block
    replace_parameters_(model, lambda p: p.to("meta", dtype if p.is_meta else p.dtype))
    stored = find_stored_weights(name, model)
    whole: dict[str, Tensor] = {}
    with _InfiniteBarrier():  # NCCL would give up on a rank that takes half an hour to load
        if not stored and mesh.get_local_rank() == 0:
            loaded = build(False)
            whole = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
            del loaded  # a weight is freed when it is handed out
    causal_lm = CausalLM(model)
    shard_model(causal_lm, mesh, precision)
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            buffer.copy_(buffers[key])
        for key, tensor in {**dict(model.named_parameters()), **persistent_buffers(model)}.items():
            if stored:
                _read_local_part(tensor, stored[key].path, key)
            else:
                _broadcast_weight(tensor, whole.pop(key, None), mesh)
    if stored:  # else rank 0 has looked
        check_finite(name, model)
    return causal_lm


def _read_local_part(tensor: Tensor, path: Path, key: str) -> None:
    """Reads this process's part of a weight, and nothing else of the file."""
    with safe_open(path, "pt") as file:
        if not isinstance(tensor, DTensor):
            tensor.copy_(file.get_tensor(key))
            return
        shape, offset = local_shape_and_offset(tensor)
        if 0 not in shape:
            part = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            tensor.to_local().copy_(file.get_slice(key)[part])


def _broadcast_weight(tensor: Tensor, whole: Tensor | None, mesh: DeviceMesh) -> None:
    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if whole is not None:
        full.copy_(whole)
    sent = distribute_tensor(full, mesh, tensor.placements if isinstance(tensor, DTensor) else [Replicate()])  # from rank 0
    tensor.copy_(sent if isinstance(tensor, DTensor) else sent.to_local())
