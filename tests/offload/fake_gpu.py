"""A GPU on a machine without one: tensors that say they lie on it, and streams that run as late, or as early, as events allow.

All memory is the host's, and all kernels are the CPU's, so that bits can be compared. What is checked beside them:

* **two sides**: no operator but a copy takes tensors of both sides, and none but a copy reads an offloaded block;
* **order**: of two accesses to the same memory, of which one writes, by two of host, computing stream, copy stream and reading
  thread, one is known to have ended when the other one begins, by events, streams and waits (vector clocks, as in
  ``torch.cuda._sanitizer``);
* **lifetime**: the memory of a launched copy is still there when it runs, which in the late mode is at the last moment.

A slot holds NaN (in float32 and bfloat16) from its release until something is fetched into it or it is used again. Page-locked
memory that was unlocked fails every copy that still reads it: others may go on using it as ordinary memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward, increment_version
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ows_lightning.offload import streams
from ows_lightning.offload.disk import DiskWeights, FileRegion
from ows_lightning.offload.int8 import Int8Weights
from ows_lightning.offload.offloader import BlockOffloader

aten = torch.ops.aten
GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
POISON = 255  # of every byte: NaN


class Clock:
    """What the host, a stream or a thread knows to have happened: for each of them, the number of its last known act."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[Clock, int] = {self: 0}

    def act(self) -> int:
        """Does something, and returns its number."""
        self.known[self] += 1
        return self.known[self]

    def learn(self, known: dict[Clock, int]) -> None:
        """Waits for what another one knew."""
        for clock, time in known.items():
            self.known[clock] = max(self.known.get(clock, 0), time)


class Memory:
    """What is known of a storage: its side, and who read and wrote it last. Kept on the storage itself."""

    def __init__(self) -> None:
        self.on_gpu = False
        self.offloaded = False
        self.pinned = False  # by torch
        self.written: tuple[Clock, int] | None = None
        self.read: dict[Clock, int] = {}

    def access(self, clock: Clock, writes: bool, what: object) -> None:
        """Fails unless the clock knows of the end of every access that this one could race with."""
        others = [*([self.written] if self.written else []), *(self.read.items() if writes else ())]
        for other, time in others:
            if clock.known.get(other, 0) < time:
                verb = "writes" if writes else "reads"
                raise AssertionError(f"race: {what} of the {clock.name} {verb} what the {other.name} may still use")
        time = clock.act()
        if writes:
            self.written, self.read = (clock, time), {}
        else:
            self.read[clock] = time


def memory_of(tensor: Tensor) -> Memory:
    """What is known of a tensor's memory."""
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        if not hasattr(storage, "fake_gpu"):
            storage.fake_gpu = Memory()
        return storage.fake_gpu


class Stream:
    """A stream; the one that computes runs at once, and another one when it has to, if `gpu.late`."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.clock = gpu, Clock(name)
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def launch(self, run: Callable[[], None]) -> None:
        self.queue.append(run)
        if not self.gpu.late:
            self.run_until(len(self.queue))

    def run_until(self, position: int) -> None:
        while self.done < position:
            run, self.queue[self.done] = self.queue[self.done], lambda: None
            self.done += 1
            with self.gpu.failures_kept():
                run()

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            event.stream.run_until(event.position)
            self.clock.learn(event.known)

    def wait_stream(self, stream: Stream) -> None:
        stream.run_until(len(stream.queue))
        self.clock.learn(stream.clock.known)

    def synchronize(self) -> None:
        self.run_until(len(self.queue))
        self.gpu.host.learn(self.clock.known)


class Event:
    """An event; waiting for one that was never recorded waits for nothing, as on a GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current
        self.stream, self.position, self.known = stream, len(stream.queue), dict(stream.clock.known)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)
            self.gpu.host.learn(self.known)

    def elapsed_time(self, other: Event) -> float:
        return 0.0

    def query(self) -> bool:
        return True


class Thread:
    """Takes the place of the reading thread: its work is done when somebody waits for it, or at once."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.clock = gpu, Clock("reading thread")
        self.queue: list[Future] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> Future:
        future = Future(self, dict(self.gpu.host.known), lambda: work(*args))
        self.queue.append(future)
        if not self.gpu.late:
            self.run_until(future)
        return future

    def run_until(self, last: Future) -> None:
        while not last.done:
            future = self.queue.pop(0)
            host, self.gpu.host = self.gpu.host, self.clock
            self.clock.learn(future.known)
            try:
                with self.gpu.failures_kept():
                    future.work()
            except Exception as error:
                future.error = error
            finally:
                self.gpu.host = host
                future.done, future.work = True, lambda: None


class Future:
    """Work of a `Thread`."""

    def __init__(self, thread: Thread, known: dict[Clock, int], work: Callable[[], Any]) -> None:
        self.thread, self.known, self.work = thread, known, work
        self.done, self.error = False, None

    def exception(self) -> Exception | None:
        self.thread.run_until(self)
        self.thread.gpu.host.learn(self.thread.clock.known)
        return self.error

    def result(self) -> None:
        if error := self.exception():
            raise error


class FakeGpu:
    """The GPU, as a context in which ``torch.cuda`` is this one.

    Args:
        late: Copies run at the last moment that events allow; otherwise at the first.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self.host = Clock("host")
        self.compute = Stream(self, "computing stream")
        self.compute.launch = lambda run: run()  # type: ignore[method-assign]
        self.current = self.compute
        self.streams = [self.compute]
        self.locked: dict[int, int] = {}  # bytes by address
        self.may_read_offloaded = False
        self.failures: list[AssertionError] = []

    @contextlib.contextmanager
    def failures_kept(self) -> Iterator[None]:
        """Keeps a failure for the end: those within a finalizer, or in work that nobody waits for, are not raised."""
        try:
            yield
        except AssertionError as error:
            self.failures.append(error)
            raise

    @contextlib.contextmanager
    def offloaded_read(self) -> Iterator[None]:
        """Lets the host compute with offloaded blocks, as an export does that looks for NaN."""
        self.may_read_offloaded, before = True, self.may_read_offloaded
        yield
        self.may_read_offloaded = before

    def is_locked(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + size for start, size in self.locked.items())

    def finish(self) -> None:
        """Runs all that has not run, wherever its memory is now; no model is left that would need page-locked memory."""
        for stream in self.streams:
            stream.run_until(len(stream.queue))
        for failure in self.failures:
            raise failure
        assert not self.locked, "page-locked memory that nobody has is not unlocked"

    @contextlib.contextmanager
    def installed(self) -> Iterator[FakeGpu]:
        """Takes the place of ``torch.cuda``."""
        with pytest.MonkeyPatch.context() as patch, _Operators(self), _Devices(self):
            self._patch_cuda(patch)
            self._patch_offloading(patch)
            yield self
            gc.collect()  # models that are dropped, with what they had begun to fetch
            self.finish()

    def _patch_cuda(self, patch: pytest.MonkeyPatch) -> None:
        class NewStream(Stream):
            def __init__(stream, device: torch.device) -> None:
                super().__init__(self, "copy stream")
                self.streams.append(stream)

        class NewEvent(Event):
            def __init__(event, **_: Any) -> None:
                super().__init__(self)

        @contextlib.contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        def synchronize(device: Any = None) -> None:
            for stream in self.streams:
                stream.synchronize()

        for name, double in (
            ("Stream", NewStream),
            ("Event", NewEvent),
            ("current_stream", lambda device=None: self.current),
            ("stream", on_stream),
            ("device", lambda device: contextlib.nullcontext()),
            ("synchronize", synchronize),
            ("cudart", lambda: self),
        ):
            patch.setattr(torch.cuda, name, double)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(streams, "ThreadPoolExecutor", lambda *_: Thread(self))

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.locked.pop(address, None)  # None if an earlier one of these GPUs locked it

    def _patch_offloading(self, patch: pytest.MonkeyPatch) -> None:
        """Poisons slots, marks offloaded blocks, and tells what reads a file."""
        kept: dict[int, bytes] = {}  # of a released slot, by address, until something is fetched into it

        def around(owner: type, name: str, wrap: Callable[..., Any]) -> None:
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *args: wrap(original, *args))

        def issue(original: Any, offloader: BlockOffloader, block: int, slot: int) -> None:
            kept.pop(offloader.slots[slot].data_ptr(), None)
            original(offloader, block, slot)

        def wait(original: Any, offloader: BlockOffloader, block: int, slot: int) -> None:
            address = offloader.slots[slot].data_ptr()
            if address in kept:
                ctypes.memmove(address, kept.pop(address), offloader.slots[slot].nbytes)
            original(offloader, block, slot)

        def release(original: Any, offloader: BlockOffloader, block: int, slot: int) -> None:
            original(offloader, block, slot)
            address, size = offloader.slots[slot].data_ptr(), offloader.slots[slot].nbytes
            kept[address] = ctypes.string_at(address, size)
            ctypes.memset(address, POISON, size)

        def set_active(original: Any, offloader: BlockOffloader, active: Any) -> None:
            kept.clear()
            original(offloader, active)
            for index, weights in enumerate(offloader.offloaded):
                for tensor in weights.tensors:
                    memory_of(tensor).offloaded = index not in active

        def quantize(original: Any, weights: Int8Weights, values: Any) -> None:
            with self.offloaded_read():
                original(weights, values)

        def fetch_file(original: Any, weights: DiskWeights, slot: Any, *exact: bool) -> None:
            for tensor in weights.tensors:
                memory_of(tensor).access(self.host, False, "reading a file")
            original(weights, slot, *exact)

        def read(original: Any, region: FileRegion, offset: int, target: Tensor) -> None:
            memory_of(target).access(self.host, True, "reading a file")
            original(region, offset, target)

        for owner, name, wrap in (
            (BlockOffloader, "issue", issue),
            (BlockOffloader, "wait", wait),
            (BlockOffloader, "release", release),
            (BlockOffloader, "_set_active", set_active),
            (Int8Weights, "_quantize_again", quantize),
            (DiskWeights, "fetch", fetch_file),
            (FileRegion, "read", read),
        ):
            around(owner, name, wrap)


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> torch.Generator:
        return super().__new__(cls, HOST)


class _Devices(TorchFunctionMode):
    """Lets tensors say where they are, and moves them."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__" and args[0].device == HOST:
            asked = func.__self__
            if asked is torch.Tensor.device:
                return GPU if memory_of(args[0]).on_gpu else HOST
            if asked is torch.Tensor.is_cuda:
                return memory_of(args[0]).on_gpu
            if asked is torch.Tensor.is_cpu:
                return not memory_of(args[0]).on_gpu
        if name in ("to", "cuda", "cpu") and args[0].device == HOST:
            return self._move(name, *args, **kwargs)
        if func is torch.Tensor.backward:
            return self._backward(args[0], kwargs["gradient"], kwargs["retain_graph"])
        if func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if name == "numpy":
            assert not memory_of(args[0]).on_gpu, "numpy of a tensor on the GPU"
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cuda", "cpu"):
            return func(*args, **kwargs)
        result = func(*args, **{**kwargs, "device": HOST})
        if isinstance(result, Tensor):
            result.untyped_storage().fake_gpu = memory = Memory()  # as an operator it had its argument's side
            memory.on_gpu, memory.pinned = torch.device(device).type == "cuda", bool(kwargs.get("pin_memory"))
            memory.access(self.gpu.current.clock if memory.on_gpu else self.gpu.host, True, func)
        return result

    def _backward(self, loss: Tensor, grad_tensors: Any = None, retain_graph: Any = None, **_: Any) -> None:
        gradient = torch.ones_like(loss) if grad_tensors is None else grad_tensors
        with self:
            _engine_run_backward(
                (loss,), (gradient,), bool(retain_graph), False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _move(self, name: str, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if name != "to":
            args = (torch.device("cuda" if name == "cuda" else "cpu"),)
        if args and isinstance(args[0], Tensor):
            device, dtype = GPU if memory_of(args[0]).on_gpu else HOST, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        result = tensor if dtype is None else tensor.to(dtype, copy=copy)
        if device is None or device.type == "meta":
            return result if device is None else result.to(device)
        if (device.type == "cuda") == memory_of(result).on_gpu:
            return result.clone() if copy and result is tensor else result
        with torch.no_grad(), self:
            return torch.empty_like(result, device=device).copy_(result)


_NO_ACCESS = {
    aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten._has_compatible_shallow_copy_type.default,
}  # fmt: skip


class _Operators(TorchDispatchMode):
    """Sees every operator: the sides of what it takes, and its order among all accesses to its memory."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device == HOST]
        memories = [memory_of(t) for t in given]
        on_gpu = any(memory.on_gpu for memory in memories)
        if func.is_view or func in _NO_ACCESS:
            result = func(*args, **kwargs)
            for tensor in tree_leaves(result) if on_gpu else ():
                if isinstance(tensor, Tensor):
                    memory_of(tensor).on_gpu = True  # reshaping may copy
            return result
        copies = func is aten.copy_.default
        if func in (aten.empty_like.default, aten.new_empty.default):
            memories, given = memories[:0], []  # whose contents do not count
        if not copies:
            for tensor, memory in zip(given, memories, strict=True):
                assert not on_gpu or memory.on_gpu or tensor.dim() == 0, f"{func} takes tensors of the GPU and of the host"
                may_read = func in (aten.clone.default, aten._to_copy.default) or self.gpu.may_read_offloaded
                assert not memory.offloaded or may_read, f"{func} reads an offloaded block"
        if copies and on_gpu and not memories[1].on_gpu and not given[1].is_contiguous():
            memories[1].access(self.gpu.host, False, func)  # CUDA has the host make such a source contiguous, at once
        clock = self.gpu.current.clock if on_gpu else self.gpu.host
        if on_gpu:
            clock.learn(self.gpu.host.known)
        written = _written(func, args, kwargs)
        for tensor, memory in zip(given, memories, strict=True):
            memory.access(clock, id(tensor) in written, func)
        if on_gpu and self.gpu.current is not self.gpu.compute:
            return self._launch(func, args, kwargs, copies)
        result = func(*args, **kwargs)
        if func.name().startswith("aten::_foreach"):  # whose writes torch does not count within such a mode
            increment_version([tensor for tensor in given if id(tensor) in written])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == HOST and id(tensor) not in written:
                memory = memory_of(tensor)
                if on_gpu and all(memory is not other for other in memories):
                    memory.on_gpu = True
                    memory.access(clock, True, func)
        mixed = copies and memories[0].on_gpu != memories[1].on_gpu
        if func is aten._local_scalar_dense.default or (mixed and not self._asynchronous(args, kwargs)):
            self.gpu.host.learn(self.gpu.compute.clock.known)
        return result

    def _asynchronous(self, args: Any, kwargs: Any) -> bool:
        on_host = args[0] if memory_of(args[1]).on_gpu else args[1]
        wanted = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        locked = memory_of(on_host).pinned or self.gpu.is_locked(on_host.data_ptr(), on_host.nbytes)
        return bool(wanted) and locked

    def _launch(self, func: Any, args: Any, kwargs: Any, copies: bool) -> Any:
        """Launches a kernel on another stream than the computing one, which keeps no memory alive."""
        assert func in (aten.copy_.default, aten.mul.out), f"{func} on the copy stream"
        if copies and not memory_of(args[1]).on_gpu and not self._asynchronous(args, kwargs):
            self.gpu.current.synchronize()  # from memory that is not page-locked the process waits
        places = [self._place(t) for t in (*args[:2], *kwargs.values()) if isinstance(t, Tensor)]

        def run() -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
                tensors = [place() for place in places]
                tensors[0].copy_(tensors[1]) if copies else torch.mul(tensors[0], tensors[1], out=tensors[2])

        self.gpu.current.launch(run)
        return args[0] if copies else kwargs["out"]

    def _place(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Where a tensor lies, without a reference to it; calling it fails once the memory is gone."""
        dtype, size, stride, offset = tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        if memory_of(tensor).on_gpu:
            storage = weakref.ref(tensor.untyped_storage())

            def on_gpu() -> Tensor:
                here = storage()
                assert here is not None, "memory on the GPU was freed while a copy may run"
                return torch.empty(0, dtype=dtype).set_(here, offset, size, stride)

            return on_gpu
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        locked = self.gpu.is_locked(address, nbytes)

        def on_host() -> Tensor:
            assert not locked or self.gpu.is_locked(address, nbytes), "page-locked memory was freed while a copy may run"
            memory = (ctypes.c_char * nbytes).from_address(address)
            return torch.frombuffer(memory, dtype=dtype).as_strided(size, stride)

        return on_host


def _written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """The arguments that an operator writes into, by id."""
    written = set()
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
            written |= {id(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
    return written
