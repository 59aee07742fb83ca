"""Weights on several processes: which part of a matrix, its projected gradient and its projector lies where.

Under FSDP2 a weight is a ``DTensor``, each process holding some of its rows (or columns). All arithmetic of the optimizer runs
on the local parts. Which tensor lies where depends on the dimension along which the matrix is sharded:

==============================  =====================  ========================  =====================
dimension                       the one not projected  the projected one         a leading one (experts)
==============================  =====================  ========================  =====================
projected gradient and moments  sharded like it        on every process          sharded like it
projector                       on every process       sharded along its rows    sharded like it
an ordinary step communicates   nothing                the projected gradient    nothing
a renewal communicates          the gradient           the gradient              nothing
==============================  =====================  ========================  =====================

The middle case arises only where a dimension can't be divided evenly. Tensors that are no DTensor pass through unchanged.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from ows_lightning.compat import foreach_mul_, foreach_norm
from ows_lightning.optim.subspace import Side

if TYPE_CHECKING:  # slow to import; code that shards weights has imported it
    import torch.distributed.tensor
    from torch.distributed.tensor import DTensor, Placement

BUCKET = 1 << 23  # elements that are reduced in one message


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. Before DTensor's package is imported there are none."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this process, of its local shape; shares memory (use it without autograd)."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather_matrices(tensor: Tensor) -> Tensor:
    """The matrices of a tensor (..., m, n), each whole: (m, n), or (b, m, n) of the experts that this process has."""
    return tensor.redistribute(placements=_whole_placements(tensor)).to_local() if is_sharded(tensor) else tensor


def projected_placements(weight: DTensor, side: Side) -> list[Placement]:
    """Placements of the projected gradient and the moments of ``weight``, a DTensor of shape (..., m, n)."""
    return [torch.distributed.tensor.Replicate() if p.is_shard(_projected_dim(weight, side)) else p for p in weight.placements]


def projector_placements(weight: DTensor, side: Side) -> list[Placement]:
    """Placements of the projector of ``weight``, of shape (..., m, r) for the left side, (..., n, r) for the right."""
    along_rows, dim = torch.distributed.tensor.Shard(weight.dim() - 2), _projected_dim(weight, side)
    pairs = zip(weight.placements, _whole_placements(weight), strict=True)
    return [along_rows if p.is_shard(dim) else whole for p, whole in pairs]


def shard_state(value: Tensor, weight: Tensor, side: Side | None = None, is_projector: bool = False) -> Tensor:
    """Returns this process's part of a saved state tensor, where the weight is sharded and the tensor is not."""
    if not is_sharded(weight) or is_sharded(value):
        return value
    placements: Sequence[Placement] = weight.placements
    if side is not None and value.shape != weight.shape:
        placements = (projector_placements if is_projector else projected_placements)(weight, side)
    return torch.distributed.tensor.distribute_tensor(value, weight.device_mesh, placements, src_data_rank=None)


def reduce_projected(part: Tensor, weight: Tensor, side: Side) -> Tensor:
    """Turns each process's local product into the projected gradient; all-reduced where that dimension is sharded."""
    if not is_sharded(weight):
        return part
    dim = _projected_dim(weight, side)
    # Where the projected dimension is sharded, every process has one summand of the product.
    placements = [torch.distributed.tensor.Partial() if p.is_shard(dim) else p for p in weight.placements]
    shape = (*weight.shape[:dim], part.size(dim), *weight.shape[dim + 1 :])
    return _from_local(part, weight, placements, shape).redistribute(placements=projected_placements(weight, side))


def distribute_projector(projector: Tensor, weight: Tensor, side: Side, replicated: bool = False) -> Tensor:
    """Gives a new projector, equal on all processes (rank 0's counts), the placements of the table above.

    ``projector`` has the shape (..., n, r) for the right side, (..., m, r) for the left, and is overwritten by rank 0's: all
    ranks have computed the same, but not bit by bit. With ``replicated`` every process holds the whole weight.
    """
    if not is_sharded(weight):
        if replicated:
            broadcast_(projector)
        return projector
    placements = _whole_placements(weight)
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            broadcast_(projector, weight.device_mesh.get_group(dim))
    tensor = _from_local(projector, weight, placements, (*weight.shape[:-2], *projector.shape[-2:]))
    return tensor.redistribute(placements=projector_placements(weight, side))


def broadcast_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sends the first rank's values, of any layout: NCCL takes contiguous ones alone, and Q of a decomposition is not."""
    sent = tensor.contiguous()
    dist.broadcast(sent, group=group, group_src=0)
    tensor.copy_(sent)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The joint 2-norm of tensors of any shapes and dtypes, a scalar equal on all processes; one number is communicated.

    It is float32 also where the tensors are in half precision, whose squares overflow; float64 where one of them is.
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = [norm.to(tensors[0].device) for norm in foreach_norm([local(t) for t in tensors], 2, dtype)]
    mesh = next((t.device_mesh for t in tensors if is_sharded(t)), None)
    if mesh is None:
        return torch.linalg.vector_norm(torch.stack(norms))
    replicas = [_num_replicas(t) if is_sharded(t) else mesh.size() for t in tensors]
    square = torch.stack([norm.square() / number for norm, number in zip(norms, replicas, strict=True)]).sum()
    for dim in range(mesh.ndim):
        dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()


def clip_(gradients: Sequence[Tensor], norm: Tensor, limit: float, algorithm: str = "norm") -> None:
    """Scales gradients in place so that ``norm``, theirs or a larger set's, is at most ``limit``; or clamps by ``value``."""
    if algorithm == "value":
        for gradient in gradients:
            part = local(gradient)
            part.masked_fill_(part.isinf(), math.nan).clamp_(-limit, limit)  # which keeps NaN: the step is skipped
    else:  # factor 1 for a norm that is NaN, which would else spread to every gradient
        scale_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).nan_to_num(nan=1.0))


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies gradients, which may lie on several devices, by a scalar, in place."""
    parts = [local(gradient) for gradient in gradients]
    for device in {part.device for part in parts}:
        foreach_mul_([part for part in parts if part.device == device], factor.to(device))


def zero_missing_gradients(parameters: Sequence[Tensor], has_gradient: Sequence[bool]) -> None:
    """Gives parameters that have a gradient on some process, but not here, a ``grad`` of zeros."""
    if not parameters:
        return
    flags, device = torch.tensor(has_gradient, dtype=torch.uint8), parameters[0].device
    anywhere = torch.ones_like(flags, device=device) if all(has_gradient) else flags.to(device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if not all(has_gradient):  # else none is missing here, and no device is waited for
        for p, here, somewhere in zip(parameters, has_gradient, anywhere.tolist(), strict=True):
            if somewhere and not here:
                p.grad = torch.zeros_like(p)


def average_(tensors: Sequence[Tensor]) -> None:
    """Averages tensors of any shapes over all processes, in place; small ones share a message."""
    buckets: dict[torch.dtype, list[list[Tensor]]] = {}
    for tensor in tensors:
        of_dtype = buckets.setdefault(tensor.dtype, [[]])
        if sum(t.numel() for t in of_dtype[-1]) + tensor.numel() > BUCKET:
            of_dtype.append([])
        of_dtype[-1].append(tensor)
    for bucket in (bucket for of_dtype in buckets.values() for bucket in of_dtype if bucket):
        flat = torch.cat([t.flatten() for t in bucket]) if len(bucket) > 1 else bucket[0].flatten()  # no copy of a large one
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _projected_dim(weight: Tensor, side: Side) -> int:
    return weight.dim() - (1 if side == "right" else 2)


def _whole_placements(tensor: DTensor) -> list[Placement]:
    """Of the tensor's matrices, each whole: leading dimensions stay distributed."""
    replicate, Shard = torch.distributed.tensor.Replicate(), torch.distributed.tensor.Shard
    return [p if isinstance(p, Shard) and p.dim < tensor.dim() - 2 else replicate for p in tensor.placements]


def _num_replicas(tensor: DTensor) -> int:
    return math.prod(tensor.device_mesh.size(dim) for dim, p in enumerate(tensor.placements) if p.is_replicate())


def _from_local(part: Tensor, weight: DTensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    whole: Any = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
    return torch.distributed.tensor.DTensor.from_local(part, weight.device_mesh, placements, run_check=False, **whole)
