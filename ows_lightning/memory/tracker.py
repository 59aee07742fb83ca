"""MemoryTracker: follows the bytes that tensors hold, real or fake, by what they turn out to be; and counts FLOPs."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ows_lightning.compat import storage_key

aten = torch.ops.aten
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ITS_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
HOST = "host"


def operator_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the FLOPs of an operator's matrix products, two for a multiplication with its addition; 0 for all else.

    Fused attention counts as its matrix products would one by one, masked or not: two in forward, five in backward.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is _ATTENTION:  # on CPUs, for which older versions of torch have no formula
        return _attention(1, 1, *args[:3])
    if packet is _ITS_BACKWARD:
        return _attention(3, 2, *args[1:4])
    return 2 * prod(args[0].shape) * int(args[1].shape[-1]) if packet is aten._grouped_mm else 0  # a row meets one expert


def _attention(with_keys: int, with_values: int, query: Tensor, key: Tensor, value: Tensor) -> int:
    return 2 * prod(query.shape[:-1]) * key.size(-2) * (with_keys * key.size(-1) + with_values * value.size(-1))


@dataclass(eq=False, slots=True)
class _Allocation:
    size: int
    category: str
    reference: Any


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that live at a time, and breaks its peaks down by category.

    A storage is allocated when an operator first returns it and freed when the last tensor on it dies. Its category is
    often known only later (a tensor turns out to be a gradient): `label` may set it at any time, also for peaks that are
    already past. Until then, a storage has the `category` that was set when it came up.

    Every instant belongs to one span (`begin_span`); `peaks` has the peak of each, and `flops` what was computed in it. What
    kernels allocate within themselves is not seen. Sizes are rounded up to the alignment: 512 bytes for CUDA's allocator.
    """

    def __init__(self, alignment: int = 1, operate: Callable[[Any, Sequence[Any], dict[str, Any]], Any] | None = None) -> None:
        super().__init__()
        self._operate = operate or (lambda func, args, kwargs: func(*args, **kwargs))
        self.category = "other"
        self._alignment = alignment
        self._alive: dict[int, _Allocation] = {}
        self._bytes = 0
        self.span: tuple[Any, ...] = ()
        self._peak, self._rising = 0, True
        self._at_peak: list[_Allocation] = []
        self._peaks: dict[tuple[Any, ...], tuple[int, list[_Allocation]]] = {}
        self.flops: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = self._operate(func, args, kwargs or {})
        self.flops[self.span] += operator_flops(func, args, kwargs or {}, result)
        for value in [result] if isinstance(result, Tensor) else tree_leaves(result):  # faster, and the usual case
            if isinstance(value, Tensor):
                self._allocation(value)
        return result

    def label(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """Says what tensors are for. The category ``host`` takes them out of the count: they are in another memory."""
        for tensor in tensors:
            if tensor is None:
                continue
            allocation = self._allocation(tensor)
            if (allocation.category == HOST) != (category == HOST):
                self._count(allocation.size if category != HOST else -allocation.size)
                # An allocation of its own, for a peak before the move keeps the old one.
                allocation = self._alive[storage_key(tensor)] = replace(allocation)
            allocation.category = category

    def begin_span(self, span: tuple[Any, ...]) -> None:
        """Ends the current span. A span that was there before goes on: it keeps the higher peak."""
        if self._rising:
            self._snapshot()
        if self.span not in self._peaks or self._peak > self._peaks[self.span][0]:
            self._peaks[self.span] = self._peak, self._at_peak
        self.span = span
        self._peak, self._rising = self._bytes, True

    def peaks(self) -> dict[tuple[Any, ...], dict[str, int]]:
        """Returns the bytes by category at the peak of each span."""
        self.begin_span(self.span)
        peaks: dict[tuple[Any, ...], dict[str, int]] = {}
        for span, (_, alive) in self._peaks.items():
            sizes = peaks[span] = defaultdict(int)
            for allocation in alive:
                if allocation.category != HOST:
                    sizes[allocation.category] += allocation.size
        return peaks

    def _allocation(self, tensor: Tensor) -> _Allocation:
        """The memory of a tensor's storage, counted from the first call on until the storage is gone."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if (allocation := self._alive.get(key)) is None:
            size = -(-storage.nbytes() // self._alignment) * self._alignment

            def forget(_: Any) -> None:
                freed = self._alive[key]
                self._count(0 if freed.category == HOST else -freed.size)
                del self._alive[key]

            allocation = self._alive[key] = _Allocation(size, self.category, weakref.ref(storage, forget))
            self._count(0 if self.category == HOST else size)
        return allocation

    def _count(self, size: int) -> None:
        if size < 0 and self._rising:
            self._snapshot()
        self._bytes += size
        if self._bytes > self._peak:
            self._peak, self._rising = self._bytes, True

    def _snapshot(self) -> None:
        """Notes what is alive at the peak so far: at its end, since a copy at every allocation would take long."""
        self._at_peak, self._rising = list(self._alive.values()), False
