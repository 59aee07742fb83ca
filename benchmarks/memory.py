"""The memory that work on a device takes, measured: of this process on a CPU, of tensors on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import re
from pathlib import Path

import torch

MB = 10**6


def memory_of(device: torch.device) -> _ProcessMemory | _CudaMemory:
    """What measures the memory that work on a device takes."""
    return _CudaMemory() if device.type == "cuda" else _ProcessMemory()


class _ProcessMemory:
    """Resident memory of this process, in MB; Linux alone tells the peak of a phase."""

    def release(self) -> None:
        """Gives back what the allocator holds without need."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def held(self) -> float:
        return self._status("VmRSS")

    def peak(self) -> float:
        return self._status("VmHWM")

    def tensors(self) -> float:
        gc.collect()
        there = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
        storages = [tensor.untyped_storage() for tensor in there]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / MB

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def synchronize(self) -> None:
        """Nothing runs ahead on a CPU."""

    def machine(self) -> str:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"

    @staticmethod
    def _status(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / MB


class _CudaMemory:
    """Memory of tensors on the GPU, in MB."""

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def held(self) -> float:
        return torch.cuda.memory_allocated() / MB

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MB

    def tensors(self) -> float:
        return self.held()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def machine(self) -> str:
        return torch.cuda.get_device_name()
