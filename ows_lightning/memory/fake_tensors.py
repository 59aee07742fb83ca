"""Fake tensors: a shape, a storage that knows its size, no contents. Operators on them, and models of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from ows_lightning.compat import replace_parameters_, storage_key

aten, profiler = torch.ops.aten, torch.ops.profiler
_RUN_AS_IS = profiler._record_function_enter_new.default, profiler._record_function_exit._RecordFunction


class FakeOperators:
    """Runs operators on fake CPU tensors, for a `MemoryTracker`.

    The layout of an operator's result follows from those of its arguments. torch's FakeTensorMode tells it, once for each,
    since a lookup takes a tenth of the time. Of chunked work only the chunks that decide the peak are run; with
    ``merge_chunks`` it is done in one, which takes more memory and the same FLOPs.
    """

    _results: ClassVar[dict[Any, Any]] = {}  # of the process: layouts, never tensors, that all simulations share

    def __init__(self, merge_chunks: bool = False) -> None:
        self._merge_chunks, self._fake_mode = merge_chunks, FakeTensorMode()

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Returns what an operator does. What depends on values gets the worst answer: a mask selects all, a number is 1."""
        if func in _RUN_AS_IS:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            tensor, (mask,) = args
            func, args = aten.new_empty.default, (tensor, [mask.numel(), *tensor.shape[mask.dim() :]])
        if func is aten.nonzero.default:
            (mask,) = args
            func, args, kwargs = aten.new_empty.default, (mask, [mask.numel(), mask.dim()]), {"dtype": torch.int64}
        if func is aten.split.Tensor and not torch.is_grad_enabled():  # work chunk by chunk
            tensor, size, dim = (*args, 0)[:3]
            starts = range(0, tensor.size(dim), size)
            if len(starts) > 3:  # from the second on, each meets its predecessor's leftovers, and the last may be smaller
                chunks = [(0, tensor.size(dim))] if self._merge_chunks else [(at, at + size) for at in (0, size, starts[-1])]
                return [self(aten.slice.Tensor, (tensor, dim, *chunk), {}) for chunk in chunks]
        inputs = (*args, *kwargs.values())
        key = func, tuple(kwargs), _layout(inputs)
        if key not in self._results:
            self._results[key] = self._infer(func, args, kwargs)
        result = self._results[key]
        if isinstance(result, _TensorSpec):  # faster, and the usual case
            return result.make(inputs)
        return tree_map_only(_TensorSpec, lambda spec: spec.make(inputs), result)

    def _infer(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Returns an operator's result with a `_TensorSpec` in each tensor's place."""

        def stand_in(tensor: Tensor) -> Tensor:
            whole = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype, device="meta")
            part = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            return FakeTensor(self._fake_mode, part, tensor.device)

        args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
        with self._fake_mode:
            if func is aten._grouped_mm.default:  # experts; torch tells its layout in bfloat16 alone
                result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
            else:
                result = func(*args, **kwargs)
        # What is lifted is a real tensor, of which a fake one is to be made.
        inputs = () if func is aten.lift_fresh.default else (*args, *kwargs.values())
        return tree_map_only(Tensor, partial(_TensorSpec.of, inputs=inputs), result)


def to_fake_(model: nn.Module) -> None:
    """Turns a meta model's tensors into fake ones (under `FakeOperators`). Shared weights stay shared."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor

    replace_parameters_(model, fake)
    model._apply(fake)  # buffers


class _Fake(FakeTensor):
    """A tensor without contents; a FakeTensor, since transformers reads no mask values of one."""

    device, layout = Tensor.device, Tensor.layout
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} needs a tensor with contents")

    def data_ptr(self) -> int:
        raise RuntimeError("a tensor without contents has no address")  # 0 is one that Triton's kernels read from


@dataclass(frozen=True, slots=True)
class _TensorSpec:
    """A tensor that an operator returns: a new one, one on the storage of an input, or an input itself."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None
    is_input: bool

    @classmethod
    def of(cls, tensor: Tensor, inputs: Sequence[Any]) -> "_TensorSpec":
        storage = storage_key(tensor)
        source = next((i for i, x in enumerate(inputs) if isinstance(x, Tensor) and storage_key(x) == storage), None)
        layout = tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.device
        return cls(*layout, source, source is not None and tensor is inputs[source])

    def make(self, inputs: Sequence[Any]) -> Tensor:
        source: Any = None if self.source is None else inputs[self.source]
        if self.is_input and source.shape == self.shape and source.stride() == self.stride:
            return source
        layout: dict[str, Any] = {"strides": self.stride, "dtype": self.dtype, "device": self.device}
        made: Any = source if self.is_input else Tensor._make_wrapper_subclass(_Fake, self.shape, **layout)
        if source is None:
            return made
        with torch._C._DisableTorchDispatch():
            return made.set_(source.untyped_storage(), self.offset, self.shape, self.stride)


def _layout(value: Any) -> Any:
    """What the layout of an operator's result depends on, hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_layout, value))
    return None if isinstance(value, torch.Generator) else (type(value), value)
