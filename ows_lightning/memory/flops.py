"""FLOPs of operators: those that torch's own counter knows, and a few that it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_ATTENTION, _ITS_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the FLOPs of an operator's matrix products, two for a multiplication with its addition; 0 for all else.

    Fused attention counts as its matrix products would one by one: two in forward, four in backward, masked or not.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is _ATTENTION:
        return _attention(*args[:3])
    if packet is _ITS_BACKWARD:
        return 2 * _attention(*args[1:4])
    if packet is aten._grouped_mm:  # experts: each row meets the matrix of one of them
        return 2 * prod(args[0].shape) * int(args[1].shape[-1])
    return 0


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    rows = prod(query.shape[:-1])
    return 2 * rows * key.size(-2) * (query.size(-1) + value.size(-1))
