"""Measures one method in a process of its own: ``python -m benchmarks.worker SETTINGS``, both ways in JSON."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, Setting
from benchmarks.models import WORKLOADS, BatchShape, block_probabilities, load, random_batch
from ows_lightning.optim.galore import GaLoreAdamW

MB = 10**6
WARM_UP = 3


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains for a while and returns what was measured.

    Args:
        settings: ``model``, ``directory`` (where its weights are), ``device``, ``dtype``, ``method``, ``shape`` (a
            ``BatchShape`` as a list), ``steps``, ``interval`` and ``repeat``, which seeds everything.

    Returns:
        ``seconds`` of each measured optimizer step and of each ``warm_up`` step before; ``held_mb`` before the first step;
        by interval ``interval_peak_mb``, the peak within, and ``interval_tensors_mb``, the tensors alive at its end;
        ``losses``, the first and the last; ``machine`` in words. What is held and its peak are resident memory of the process
        on a CPU, memory of tensors on a GPU.
    """
    device = torch.device(settings["device"])
    workload, directory = WORKLOADS[settings["model"]], Path(settings["directory"])
    shape, repeat, steps = BatchShape(*settings["shape"]), settings["repeat"], WARM_UP + settings["steps"]
    torch.manual_seed(repeat)
    model = load(workload, directory, device, getattr(torch, settings["dtype"]))
    vocab_size = model.config.vocab_size
    probabilities = block_probabilities(workload, directory)
    training = METHODS[settings["method"]][1](model, Setting(workload.rank, settings["interval"], probabilities, repeat))
    optimizer = training.optimizer

    memory = memory_of(device)
    memory.release()
    held_before = memory.held()
    seconds, losses, interval_peaks, interval_tensors = [], [], [], []
    memory.reset_peak()
    for step in range(steps):
        seed = (repeat * steps + step) * shape.accumulate
        batches = [random_batch(shape, vocab_size, seed + micro) for micro in range(shape.accumulate)]
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        memory.synchronize()
        start = time.perf_counter()
        if step % settings["interval"] == 0:
            training.draw()
        for micro, batch in enumerate(batches):
            if isinstance(optimizer, GaLoreAdamW):
                optimizer.accumulating = micro < shape.accumulate - 1
            loss = training.loss(training.model, batch) / shape.accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item() * shape.accumulate)
        if (step + 1) % settings["interval"] == 0 or step == steps - 1:
            interval_peaks.append(memory.peak())
            interval_tensors.append(memory.tensors())
            memory.reset_peak()
    return {
        "seconds": seconds[WARM_UP:],
        "warm_up": seconds[:WARM_UP],
        "held_mb": held_before,
        "interval_peak_mb": interval_peaks,
        "interval_tensors_mb": interval_tensors,
        "losses": [losses[0], losses[-1]],
        "machine": memory.machine(),
    }


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


def main() -> None:
    """Prints the result as one line; a GPU without enough memory is a result, too."""
    settings = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = measure(settings)
        except torch.OutOfMemoryError:
            result = {"error": "out of memory", "machine": torch.cuda.get_device_name()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
