"""``python -m benchmarks.evidence STUDY``: makes the runs that a study lacks, and the table of those that are there."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.evidence import ledger, tasks
from benchmarks.evidence.runs import evaluate, scored
from benchmarks.evidence.schedule import Schedule, commit
from benchmarks.evidence.study import RESULTS, ROOT, STUDIES, Study, load, model_directory
from benchmarks.evidence.tables import write_tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, runs the study and writes its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("study", help="a name in benchmarks/studies, or a YAML file")
    parser.add_argument("--model", help="start from this model instead: a hub name, a directory or a .gguf file")
    parser.add_argument("--precision", help="the Trainer's precision, e.g. bf16-true on a GPU")
    parser.add_argument("--data-root", type=Path, help="folder of NAME_train.jsonl and NAME_test.jsonl, also of your own")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the study, or others")
    parser.add_argument("--methods", nargs="+", help="only these methods of the study, e.g. those that this machine is to run")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds of the study")
    parser.add_argument("--budget", type=int, help="target tokens of a run, instead of the study's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="threads of a run; by default the runs share the cores")
    parser.add_argument("--alone", action="store_true", help="write seconds down, also of earlier runs; nothing else may run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence", help="folder of runs and data")
    parser.add_argument("--tables", action="store_true", help="make the tables alone, from the CSV file")
    args = parser.parse_args(arguments)
    try:
        study = load(args.study)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    study = replace(study, model=args.model or study.model, precision=args.precision or study.precision)
    all_tasks = study.tasks
    wanted = {task: args.budget or budget for task, budget in study.tasks.items() if not args.tasks or task in args.tasks}
    if (others := set(args.tasks or ()) - wanted.keys()) and not args.budget:
        parser.error(
            f"--tasks: {', '.join(sorted(others))} is not in {study.name}; say with --budget for how many target tokens"
        )
    if args.results == RESULTS and (args.model or args.precision or (args.budget and wanted)):
        parser.error("--model, --precision, --budget: the rows there are of the study's own; name a folder by --results")
    study = replace(study, tasks={**wanted, **dict.fromkeys(sorted(others), args.budget)})
    if others := set(args.methods or ()) - {method.name for method in study.methods}:
        parser.error(f"--methods: {', '.join(sorted(others))} is not in {study.name}")
    rounds = []
    for each in study.order():
        methods = tuple(method for method in each.methods if not args.methods or method in args.methods)
        rounds.append(replace(each, methods=methods, seeds=tuple(s for s in each.seeds if not args.seeds or s in args.seeds)))
    study = replace(study, rounds=tuple(rounds))
    if not args.tables:
        run(study, args)
    print(write_tables(replace(study, tasks={**all_tasks, **study.tasks}), args.results))  # not of these runs alone


def run(study: Study, args: argparse.Namespace) -> None:
    """Makes the model's directory and the tasks' files, measures the model before training, and makes the runs."""
    counted = ledger.Ledger(args.results / f"{study.name}.csv", ledger.COUNTED)
    work, threads = args.work.absolute(), args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    model = model_directory(study.model, work / "models")
    files = {
        name: tasks.make(name.partition("@")[0], work / "tasks", study.evaluation_rows, args.data_root) for name in study.tasks
    }
    steps = {name: (task, steps_of(study, name, task, model)) for name, task in files.items()}
    for name, task in files.items():
        untrained = [row for row in counted.rows if row["method"] == "before"]
        if all(row["task"] != name for row in untrained):
            known = next((row for row in untrained if row["task"].partition("@")[0] == name.partition("@")[0]), None)
            found = known or before(study, name, task, model, work / "before" / name, threads)
            counted.add({**found, "task": name})
    tuned = ledger.Ledger(args.results / f"{study.name}_rates.csv", ledger.TUNED)
    schedule = Schedule(study, steps, counted, tuned, model, work, args.jobs, threads, args.alone)
    signal.signal(signal.SIGTERM, lambda *_: schedule.stopping.set())
    schedule.run()


def before(study: Study, name: str, task: tasks.Task, model: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The row of the model as it is before any training."""
    tested = scored(study, model, task, folder / "test", threads)
    unrelated = evaluate(study, model, tasks.UNRELATED, folder / "unrelated", threads)["val_loss"]
    nothing = {"lr": 0.0, "seed": 0, "steps": 0, "target_tokens": 0, "time_s": 0.0, "flops": 0.0, "peak_mb": None}
    return {"task": name, "method": "before", **nothing, **tested, "forgetting": unrelated, "commit": commit()}


def steps_of(study: Study, name: str, task: tasks.Task, model: Path) -> int:
    """How many optimizer steps a run has: those in the task's name, or what its target tokens buy, by the mean of its rows."""
    target_tokens = study.tasks[name]
    if target_tokens is None:
        return int(name.partition("@")[2])
    from ows_lightning.data import InstructionDataModule
    from ows_lightning.models.pretrained import load_tokenizer

    longest = {**yaml.safe_load((STUDIES / "base.yaml").read_text())["data"], **_of_data(study)}["max_seq_length"]
    data = InstructionDataModule(str(task.train), val_size=0, max_seq_length=longest, tokenizer=load_tokenizer(str(model)))
    data.prepare_data()
    data.setup("fit")
    facts = data.summary()
    return max(1, round(target_tokens * facts["rows"] / (facts["target_tokens"] * study.batch_size)))


def _of_data(study: Study) -> dict[str, Any]:
    return {key.removeprefix("data."): value for key, value in study.settings.items() if key.startswith("data.")}


if __name__ == "__main__":
    main()
