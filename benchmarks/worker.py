"""Measures one method in a process of its own: ``python -m benchmarks.worker SETTINGS``, both ways in JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import memory_of
from benchmarks.methods import METHODS, Setting
from benchmarks.models import WORKLOADS, BatchShape, block_probabilities, load, random_batch
from ows_lightning.optim.galore import GaLoreAdamW

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
