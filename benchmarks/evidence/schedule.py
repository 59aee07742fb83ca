"""Which runs a study still lacks, and in which order they are made: rates are chosen first, then seeds count."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from threading import Event

from tqdm import tqdm

from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.runs import Run
from benchmarks.evidence.study import ROOT, Method, Study
from benchmarks.evidence.tasks import Task

WIDENING = 4
"""How many rates a grid grows by, at the most, while the best lies at its edge."""


def choose_rate(rates: Sequence[float], loss: Callable[[float], float]) -> float:
    """Returns the rate with the lowest loss; the grid grows by its own factor while the best lies at an edge.

    Args:
        rates: Three rates or more, ascending; or one, which then is given, not chosen.
        loss: The validation loss of a rate; infinite where training broke down.

    Raises:
        RuntimeError: Every rate breaks down, or the best one still lies at an edge of the widened grid.
    """
    if len(rates) == 1:
        return rates[0]
    losses = {rate: loss(rate) for rate in rates}
    factor = rates[1] / rates[0]
    for _ in range(WIDENING + 1):
        best = min(losses, key=losses.__getitem__)
        if math.isinf(losses[best]):
            raise RuntimeError(f"every rate of {sorted(losses)} breaks down")
        if min(losses) < best < max(losses):
            return best
        further = float(f"{best / factor if best == min(losses) else best * factor:.2g}")
        losses[further] = loss(further)
    raise RuntimeError(f"the best rate {best:g} lies at an edge of {sorted(losses)}")


class Stopped(Exception):
    """No further run is to be made."""


@dataclass
class Schedule:
    """Makes a study's runs and writes them down.

    Attributes:
        study: The study.
        tasks: Task -> its files and the number of optimizer steps that its budget buys.
        counted: Where runs on the test split go.
        tuned: Where runs on the validation split go.
        model: The directory of the model that runs start from.
        work: Folder of the runs.
        jobs: Runs at a time.
        threads: Threads of each.
        alone: Whether nothing else ran on the machine, so that seconds are written down.
        stopping: Set, from outside, to make no further run; those in progress end, and are written down.
    """

    study: Study
    tasks: dict[str, tuple[Task, int]]
    counted: Ledger
    tuned: Ledger
    model: Path
    work: Path
    jobs: int
    threads: int
    alone: bool = False
    stopping: Event = field(default_factory=Event)

    def run(self) -> None:
        """Makes all runs that are missing, or those until ``stopping`` is set."""
        with tqdm(unit="run") as self.bar, ThreadPoolExecutor(self.jobs) as pool:
            try:
                for each in self.study.order():
                    methods = [self.study.method(name) for name in each.methods]
                    (task,) = each.tasks
                    rates = self._rates(task, methods, pool)
                    list(pool.map(partial(self._count, task, rates), product(each.seeds, methods)))
            except Stopped:
                pass

    def _rates(self, task: str, methods: Sequence[Method], pool: ThreadPoolExecutor) -> dict[str, float]:
        """The rate of each method."""
        if self.study.tune_on:
            rate = choose_rate(self.study.rates, partial(self._shared_loss, task, pool))
            return {method.name: rate for method in methods}
        # The grids first, all their runs at once; what a grid is widened by then waits for nobody.
        grids = [(rate, method) for method in methods for rate in method.rates or self.study.rates]
        list(pool.map(lambda each: self._validation_loss(task, each[1], each[0]), grids))
        return dict(zip((m.name for m in methods), pool.map(partial(self._rate, task), methods), strict=True))

    def _rate(self, task: str, method: Method) -> float:
        rates = method.rates or self.study.rates
        return choose_rate(rates, partial(self._validation_loss, task, method))

    def _shared_loss(self, task: str, pool: ThreadPoolExecutor, rate: float) -> float:
        methods = [self.study.method(name) for name in self.study.tune_on]
        losses = list(pool.map(lambda method: self._validation_loss(task, method, rate), methods))
        return sum(losses) / len(losses)

    def _validation_loss(self, task: str, method: Method, rate: float) -> float:
        losses = []
        for seed in self.study.tune_seeds:
            row = self.tuned.find(task=task, method=method.name, lr=rate, seed=seed, steps=self.tasks[task][1])
            if row is None:
                run = self._new(task, method, rate, seed)
                known = {"task": task, "method": method.name, "lr": rate, "seed": seed, "steps": run.steps, "commit": commit()}
                row = self.tuned.add({**known, "validation_loss": run.validation_loss()})
                self.bar.update()
            losses.append(float(row["validation_loss"]))
        return sum(losses) / len(losses)

    def _count(self, task: str, rates: dict[str, float], which: tuple[int, Method]) -> None:
        seed, method = which
        rate = rates[method.name]
        row = self.counted.find(task=task, method=method.name, seed=seed, steps=self.tasks[task][1])
        if row is None:
            run = self._new(task, method, rate, seed)
            known = {"task": task, "method": method.name, "lr": rate, "seed": seed, "steps": run.steps, "commit": commit()}
            figures = run.test_figures()
            self.counted.add({**known, **figures, "time_s": figures["time_s"] if self.alone else None})
            self.bar.update()
        elif self.alone and not row["time_s"]:
            self.counted.fill(row, time_s=self._new(task, method, float(row["lr"]), seed).seconds())
            self.bar.update()

    def _new(self, task: str, method: Method, rate: float, seed: int) -> Run:
        if self.stopping.is_set():
            raise Stopped
        files, steps = self.tasks[task]
        folder = self.work / self.study.name / f"{task}-{method.name}-{rate:g}-{seed}"
        return Run(self.study, files, method, rate, seed, steps, self.model, folder, self.threads)


def commit() -> str:
    """The commit of the code that runs, marked where it has changes beside new rows; empty outside a checkout."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed == 1 else "")
