"""How fetches overlap with computation: a stream of their own on a GPU, a thread for files, not at all on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class CopyStream(Protocol):
    """Orders fetches into slots against computation from them."""

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        """Runs ``fetch``, which writes into the slot, after all computation before the slot's last ``release``."""

    def wait(self, slot: int) -> None:
        """Makes computation launched from now on see the last issued fetch."""

    def release(self, slot: int) -> None:
        """Marks the end of the computation that reads the slot."""

    def after_computation(self) -> None:
        """Makes fetches issued from now on see what computation launched so far writes: other weights, and new memory."""

    def synchronize(self) -> None:
        """Holds the process up until no fetch runs: what they read and write may be written or freed."""


class CpuStream:
    """On a CPU a fetch is done when it returns."""

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        """Fetches at once."""
        fetch()

    def wait(self, slot: int) -> None:
        """Has nothing to wait for."""

    def release(self, slot: int) -> None:
        """Has nothing to mark."""

    def after_computation(self) -> None:
        """Is so in any case."""

    def synchronize(self) -> None:
        """Has nothing to wait for."""


class CudaStream:
    """On a GPU fetches run on a stream of their own; an event each way keeps both streams off each other's slot.

    Hooks of a backward pass run on autograd's thread, whose current stream is that of the forward pass: streams are asked for
    when used. What a fetch reads and writes lives at least until it has run, also where the model is dropped meanwhile.

    Args:
        device: The GPU.
        slots: Number of slots.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.arrived = [torch.cuda.Event() for _ in range(slots)]
        self.released = [torch.cuda.Event() for _ in range(slots)]
        self._running: dict[int, Callable[[], None]] = {}  # by slot; it holds the memory
        weakref.finalize(self, _synchronize, self.stream, self._running).atexit = False

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        """Launches the fetch on the copy stream, behind the slot's last release."""
        self.stream.wait_event(self.released[slot])
        with torch.cuda.stream(self.stream):
            fetch()
            self.arrived[slot].record(self.stream)
        self._running[slot] = fetch

    def wait(self, slot: int) -> None:
        """Makes the computing stream wait for the fetch; the process goes on."""
        torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])

    def release(self, slot: int) -> None:
        """Records how far the computing stream is."""
        self.released[slot].record(torch.cuda.current_stream(self.device))

    def after_computation(self) -> None:
        """Makes the copy stream wait for the computing stream; the process goes on."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Waits for the copy stream."""
        _synchronize(self.stream, self._running)


def _synchronize(stream: torch.cuda.Stream, running: dict[int, Callable[[], None]]) -> None:
    stream.synchronize()
    running.clear()


class ReaderThread:
    """Fetches that read a file, in a separate thread: computation goes on, and waits only for the block that it needs next.

    Args:
        stream: How the device orders what the thread fetches.
    """

    def __init__(self, stream: CopyStream) -> None:
        self.stream = stream
        self.thread = ThreadPoolExecutor(1, "fetch")
        self.fetches: dict[int, Future[None]] = {}

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        """Queues a fetch for the thread."""
        self.fetches[slot] = self.thread.submit(self.stream.issue, slot, fetch)

    def wait(self, slot: int) -> None:
        """Waits until the file is read, and raises the thread's error if there was one."""
        self.fetches[slot].result()
        self.stream.wait(slot)

    def release(self, slot: int) -> None:
        """Marks the end of the computation that reads the slot."""
        self.stream.release(slot)

    def after_computation(self) -> None:
        """Leaves it to the device."""
        self.stream.after_computation()

    def synchronize(self) -> None:
        """Waits for the thread, whose fetches come one after the other, and for the device."""
        for fetch in self.fetches.values():
            fetch.exception()  # waits
        self.stream.synchronize()


def copy_stream_for(device: torch.device, slots: int) -> CopyStream:
    """Returns the kind of fetches that a device needs."""
    return CudaStream(device, slots) if device.type == "cuda" else CpuStream()
