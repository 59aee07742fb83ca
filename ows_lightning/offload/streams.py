"""How fetches overlap with computation: a stream of their own on a GPU, a thread for files, not at all on a CPU."""

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class CopyStream:
    """Keeps fetches into slots and computation from them in order. This class is for a CPU, where a fetch runs at once.

    Fetches that read a file run in a thread: computation goes on, and waits only for the block that it needs next.
    """

    def __init__(self, reads_files: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, "fetch") if reads_files else None
        self._fetches: dict[int, Future[None]] = {}  # by slot, of the thread

    def issue(self, slot: int, fetch: Callable[[], None]) -> None:
        """Runs ``fetch``, which writes into the slot, after all computation before the slot's last ``release``."""
        if self._thread is None:
            self._run(slot, fetch)
        else:
            self._fetches[slot] = self._thread.submit(self._run, slot, fetch)

    def _run(self, slot: int, fetch: Callable[[], None]) -> None:
        fetch()

    def wait(self, slot: int) -> None:
        """Makes computation launched from now on see the last issued fetch."""
        if slot in self._fetches:
            self._fetches[slot].result()  # raises the thread's error if there was one

    def release(self, slot: int) -> None:
        """Marks the end of the computation that reads the slot."""

    def wait_for_computation(self) -> None:
        """Makes fetches issued from now on see what computation launched so far writes: other weights, and new memory."""

    def synchronize(self) -> None:
        """Holds the process up until no fetch runs: what they read and write may be written or freed."""
        for fetch in self._fetches.values():
            fetch.exception()  # waits


class _CudaStream(CopyStream):
    """On a GPU fetches run on a stream of their own; an event each way keeps both streams off each other's slot.

    Hooks of a backward pass run on autograd's thread, whose current stream is that of the forward pass: streams are asked for
    when used. What a fetch reads and writes lives at least until it has run, also where the model is dropped meanwhile.
    """

    def __init__(self, device: torch.device, num_slots: int, reads_files: bool = False) -> None:
        super().__init__(reads_files)
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.arrived = [torch.cuda.Event() for _ in range(num_slots)]
        self.released = [torch.cuda.Event() for _ in range(num_slots)]
        self._running: dict[int, Callable[[], None]] = {}  # by slot; it holds the memory
        weakref.finalize(self, _synchronize, self.stream, self._running).atexit = False

    def _run(self, slot: int, fetch: Callable[[], None]) -> None:
        self.stream.wait_event(self.released[slot])
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):  # a thread's own device is the first one
            fetch()
            self.arrived[slot].record(self.stream)
        self._running[slot] = fetch

    def wait(self, slot: int) -> None:
        super().wait(slot)
        torch.cuda.current_stream(self.device).wait_event(self.arrived[slot])

    def release(self, slot: int) -> None:
        self.released[slot].record(torch.cuda.current_stream(self.device))

    def wait_for_computation(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        super().synchronize()
        _synchronize(self.stream, self._running)


def _synchronize(stream: torch.cuda.Stream, running: dict[int, Callable[[], None]]) -> None:
    stream.synchronize()
    running.clear()


def copy_stream_for(device: torch.device, num_slots: int, reads_files: bool = False) -> CopyStream:
    """Returns the CopyStream for a device; a thread runs fetches that read files."""
    return _CudaStream(device, num_slots, reads_files) if device.type == "cuda" else CopyStream(reads_files)
