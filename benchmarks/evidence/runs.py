"""A run of a study: processes of ``main.py``, and the figures that they leave."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.evidence.study import ROOT, STUDIES, Method, Study
from benchmarks.evidence.tasks import UNRELATED, Task, final_number, read_rows
from ows_lightning.memory.flops import count_flops
from ows_lightning.memory.plan_settings import settings_from_config
from ows_lightning.report.run import RunRecord

# A server imports the libraries once, and each command is a fork of it: they take longer than a short run's training.
_context = multiprocessing.get_context("forkserver")


class CommandError(RuntimeError):
    """A command of ``main.py`` failed; the text is the end of what it printed."""


@dataclass(frozen=True)
class Run:
    """A run: a method on a task at a rate with a seed, for a number of optimizer steps."""

    study: Study
    task: Task
    method: Method
    lr: float
    seed: int
    steps: int
    model: Path
    folder: Path
    threads: int

    def validation_loss(self) -> float:
        """Trains, and returns the loss on the validation split; infinity if training broke down."""
        try:
            return self._without_test_rows("val_loss")
        except CommandError as error:
            if "NaN or Inf" not in str(error):  # too high a rate is an answer; anything else is a fault
                raise
            return float("inf")

    def seconds(self) -> float:
        """Trains, and returns how long that took."""
        return self._without_test_rows("time_s")

    def _without_test_rows(self, name: str) -> float:
        try:
            self._fit(self.task.validation, exact_match_rows=0)
            return _last(self.folder, name)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def test_figures(self) -> dict[str, Any]:
        """Trains, and returns the figures of the test split, of unrelated text, and of the cost."""
        exact_match = self.task.metric == "exact_match"
        try:
            self._fit(self.task.test, self.study.exact_match_rows if exact_match else 0)
            record, model = RunRecord.read(self.folder), self._model()
            forgetting = None
            if self.study.forgetting:
                forgetting = evaluate(self.study, model, UNRELATED, self.folder / "unrelated", self.threads)["val_loss"]
            if exact_match:
                metric = _last(self.folder, "val_exact_match") if self.study.exact_match_rows else None
            else:
                metric = scored(self.study, model, self.task, self.folder / "test", self.threads)["test_metric"]
            return {
                "target_tokens": int(record.series("target_tokens")[1][-1]),
                "test_loss": _last(self.folder, "val_loss"),
                "test_metric": metric,
                "forgetting": forgetting,
                "time_s": record.series("time_s")[1][-1],
                "flops": run_flops(record),
                "peak_mb": max(record.series("peak_memory_mb")[1]),
            }
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _fit(self, evaluated: Path, exact_match_rows: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was stopped
        configs = [STUDIES / "base.yaml", *(ROOT / "configs" / f"{name}.yaml" for name in self.method.configs)]
        settings = {
            "seed_everything": self.seed, "data.seed": self.seed,
            "model.model_name_or_path": self.model, "model.optimizer.init_args.lr": self.lr,
            "trainer.precision": self.study.precision, "trainer.max_steps": self.steps,
            "trainer.val_check_interval": self.steps, "trainer.default_root_dir": self.folder,
            "data.dataset": self.task.train, "data.eval_dataset": evaluated, "data.batch_size": self.study.batch_size,
            "data.exact_match_rows": exact_match_rows,
            **self.study.settings, **self.method.settings,
        }  # fmt: skip
        if "sampling" not in settings and not _without_sampling(configs):
            settings["sampling.seed"] = self.seed
        arguments = [part for config in configs for part in ("--config", str(config))]
        main("fit", arguments + [f"--{key}={_value(value)}" for key, value in settings.items()], self.folder, self.threads)

    def _model(self) -> Path:
        return next(self.folder.glob("version_*/model"))


def main(command: str, arguments: list[str], folder: Path, threads: int) -> None:
    """Runs a command of ``main.py`` in a process of its own.

    Raises:
        CommandError: It failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{command}.txt"
    # At the first command only, and not when this file is imported: a process has one such server, and others may want it.
    _context.set_forkserver_preload(["benchmarks.evidence.runs", "ows_lightning.cli.lightning_cli"])
    process = _context.Process(target=_command, args=([command, *arguments], output, threads))
    process.start()
    process.join()
    if process.exitcode:
        raise CommandError(f"{output}: {output.read_text(errors='replace')[-2000:]}")


def _command(words: list[str], output: Path, threads: int) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = ["main.py", *words]

    import torch

    from ows_lightning.cli.main import main as run

    torch.set_num_threads(threads)
    run(words)


def evaluate(
    study: Study, model: Path, rows: Path, folder: Path, threads: int, command: str = "validate", answers: int = 0
) -> dict[str, float]:
    """Returns the last figures that ``validate`` or ``test`` logs of a model on a file of rows; ``predict`` logs none."""
    data = "data.eval_dataset" if command == "validate" else "data.test_dataset"
    settings = {
        **{key: value for key, value in study.settings.items() if key.startswith(("data.", "model.max_new"))},
        "model.model_name_or_path": model, "trainer.precision": study.precision, "trainer.default_root_dir": folder,
        "data.dataset": rows, data: rows, "data.exact_match_rows": answers, "sampling": "null",
    }  # fmt: skip
    configs = ["--config", str(STUDIES / "base.yaml")]
    main(command, configs + [f"--{key}={_value(value)}" for key, value in settings.items()], folder, threads)
    if command == "predict":
        return {}
    record = RunRecord.read(folder)
    return {name: record.series(name)[1][-1] for name in record.metrics if name != "step" and record.series(name)[1]}


def scored(study: Study, model: Path, task: Task, folder: Path, threads: int) -> dict[str, float | None]:
    """Returns ``test_loss`` and ``test_metric`` of a model as it is."""
    answers = study.exact_match_rows if task.metric == "exact_match" else 0
    figures = evaluate(study, model, task.test, folder, threads, "test", answers)
    if task.metric == "final_number":
        metric = right_numbers(study, model, task, folder / "answers", threads)
    elif task.metric == "exact_match" and not answers:
        metric = None
    else:
        metric = figures[f"test_{task.metric}"]
    return {"test_loss": figures["test_loss"], "test_metric": metric}


def right_numbers(study: Study, model: Path, task: Task, folder: Path, threads: int) -> float | None:
    """Share of the first test rows whose generated answer ends with the right number; None where none is asked for."""
    if not study.exact_match_rows:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    with task.test.open(encoding="utf-8") as lines:
        rows.write_text("".join(itertools.islice(lines, study.exact_match_rows)), encoding="utf-8")
    evaluate(study, model, rows, folder, threads, "predict")
    (answers,) = folder.rglob("predictions.jsonl")
    given = read_rows(answers)
    return sum(final_number(row["generated"]) == final_number(row["reference"]) for row in given) / len(given)


def run_flops(record: RunRecord) -> float:
    """FLOPs of a run as `main.py plan` counts them: for its own draws, its tokens, and the mean length of its rows."""
    settings, tokens = settings_from_config(record.config), record.series("tokens")[1]
    rows = len(tokens) * settings.batch_size * settings.accumulate_grad_batches
    settings = replace(settings, max_seq_length=round(tokens[-1] / rows))
    return tokens[-1] * count_flops(settings, drawn=[draw.blocks for draw in record.history]).flops_per_token


def _last(folder: Path, name: str) -> float:
    return float(RunRecord.read(folder).series(name)[1][-1])


def _without_sampling(configs: list[Path]) -> bool:
    contents = [yaml.safe_load(path.read_text()) for path in configs]
    return next(content["sampling"] for content in reversed(contents) if "sampling" in content) is None


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
