"""What a step takes beside one of another method: ``python -m benchmarks.step_overhead``.

Two copies of SmolLM2-135M take the same batches in one process, one after the other and in changing order, so that a
machine whose speed changes changes both. Of the pair that is measured without ``--methods``, one has the optimizer and
projects gradients in backward, and the other has forward and backward of the same active blocks alone. The processor's time
is given, too: on a machine that others use it is what a method is to blame for.
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

WARM_UP = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints by how much a step of the second method is longer, and what of it finding subspaces is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.splitlines()[0])
    pair = ["forward_backward", "ours_frozen"]
    parser.add_argument("--methods", nargs=2, choices=list(METHODS), default=pair, metavar="METHOD", help="what is compared")
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
    models = [load(workload, directory, torch.device("cpu"), getattr(torch, args.dtype)) for _ in args.methods]
    trainings = [METHODS[method][1](model, setting) for method, model in zip(args.methods, models, strict=True)]
    shape, vocab_size = workload.shapes[0], models[0].config.vocab_size
    seconds: list[list[float]] = [[], []]
    processor: list[list[float]] = [[], []]
    for step in range(WARM_UP + args.steps):
        batch = random_batch(shape, vocab_size, seed=step)
        for turn in (0, 1) if step % 2 == 0 else (1, 0):
            start, start_processor = time.perf_counter(), time.process_time()
            _step(trainings[turn], batch, draws=step % args.interval == 0)
            seconds[turn].append(time.perf_counter() - start)
            processor[turn].append(time.process_time() - start_processor)

    print(f"{args.model}, {shape.rows} x {shape.length} tokens, {args.dtype}, {torch.get_num_threads()} threads, ", end="")
    print(f"new blocks every {args.interval} steps, {args.steps} steps: {args.methods[1]} / {args.methods[0]}\n")
    for name, times in (("time", seconds), ("processor's time", processor)):
        one, other = (steps[WARM_UP:] for steps in times)
        ratio = median(b / a for a, b in zip(one, other, strict=True))
        print(f"{name + ',':18}median step {ratio:.3f}, all steps {sum(other) / sum(one):.3f}")
    optimizer = trainings[1].optimizer
    if isinstance(optimizer, GaLoreAdamW):
        print(f"part of {args.methods[1]} that finds subspaces: {optimizer.renewal_s / sum(seconds[1]):.1%}")


def _step(training: Training, batch: dict[str, torch.Tensor], draws: bool) -> None:
    if draws:
        training.draw()
    training.loss(training.model, batch).backward()
    training.optimizer.step()
    training.optimizer.zero_grad()


if __name__ == "__main__":
    main()
