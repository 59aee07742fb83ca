"""What a step of ours takes beside forward and backward of the same active blocks: ``python -m benchmarks.step_overhead``.

Two copies of SmolLM2-135M take the same batches in one process, one after the other and in changing order, so that a
machine whose speed changes changes both. One of them has the optimizer, and projects gradients in backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.methods import METHODS, Setting, Training
from benchmarks.models import WORKLOADS, block_probabilities, load, prepare, random_batch
from ows_lightning.optim.galore import GaLoreAdamW

PAIR = ("forward_backward", "ours_frozen")
WARM_UP = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints by how much a step is longer, and what of it finding subspaces is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(WORKLOADS), default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=50, help="measured optimizer steps")
    parser.add_argument("--interval", type=int, default=10, help="optimizer steps between two draws of blocks")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="directory of the converted model")
    args = parser.parse_args(arguments)
    workload, directory = WORKLOADS[args.model], args.output.absolute() / "models" / args.model
    directory.mkdir(parents=True, exist_ok=True)
    prepare(workload, directory)
    setting = Setting(workload.rank, args.interval, block_probabilities(workload, directory), seed=0)
    models = [load(workload, directory, torch.device("cpu"), getattr(torch, args.dtype)) for _ in PAIR]
    trainings = [METHODS[method][1](model, setting) for method, model in zip(PAIR, models, strict=True)]
    shape, vocab_size = workload.shapes[0], models[0].config.vocab_size
    seconds: list[list[float]] = [[], []]
    for step in range(WARM_UP + args.steps):
        batch = random_batch(shape, vocab_size, seed=step)
        for turn in (0, 1) if step % 2 == 0 else (1, 0):
            start = time.perf_counter()
            _step(trainings[turn], batch, draws=step % args.interval == 0)
            seconds[turn].append(time.perf_counter() - start)

    plain, ours = (times[WARM_UP:] for times in seconds)
    optimizer = trainings[1].optimizer
    assert isinstance(optimizer, GaLoreAdamW)
    print(f"{args.model}, {shape.rows} x {shape.length} tokens, {args.dtype}, ", end="")
    print(f"new blocks every {args.interval} steps, {args.steps} steps\n")
    print(f"median step, ours / forward and backward alone: {median(o / p for o, p in zip(ours, plain, strict=True)):.3f}")
    print(f"all steps, ours / forward and backward alone:   {sum(ours) / sum(plain):.3f}")
    print(f"part of ours that finds subspaces:              {optimizer.renewal_s / sum(seconds[1]):.1%}")


def _step(training: Training, batch: dict[str, torch.Tensor], draws: bool) -> None:
    if draws:
        training.draw()
    training.loss(training.model, batch).backward()
    training.optimizer.step()
    training.optimizer.zero_grad()


if __name__ == "__main__":
    main()
