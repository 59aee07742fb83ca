"""What a run left in its folder, read back without the model or any training code."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import yaml

from ows_lightning.errors import UsageError, command_line

T = TypeVar("T")
SCORES_FILE = "outlier_scores.json"
HISTORY_FILE = "sampling_history.csv"
METRICS_FILE = "metrics.csv"
CONFIG_FILE = "config.yaml"
TEXT_FILES = {"Answers while it trained": "generations.csv", "Base and tuned model": "comparison.csv"}


class Draw(NamedTuple):
    """One draw of blocks: the interval's number, the optimizer step of the draw, and the blocks that train from then on."""

    interval: int
    step: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class RunRecord:
    """The record of one run: everything the pictures and tables of a report are made from."""

    name: str  # what to call the run in legends and tables
    path: Path  # the run's folder
    scores: dict[str, Any] | None = None  # ``outlier_scores.json`` (see `BlockScores`); None where no blocks were scored
    history: list[Draw] = field(default_factory=list)  # of ``sampling_history.csv``; empty where no blocks were sampled
    resting: dict[int, tuple[int, ...]] = field(default_factory=dict)  # blocks that train at rest, by the interval
    # Columns of ``metrics.csv``, all of one length; None where a row, of one logging call, has no value.
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # of ``config.yaml``
    texts: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # tables by title, see `TEXT_FILES`

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Reads a run's folder, or the newest run within; a UsageError says that there is none, or which file is damaged."""
        if not is_run_folder(folder := newest_run(Path(path))):
            missing = f"{METRICS_FILE}, {HISTORY_FILE} or {SCORES_FILE}"
            what = f"not a run folder, it has no {missing}" if folder.is_dir() else "no such folder"
            raise UsageError(f"{path}: {what}; give the folder that `fit` or `score` wrote")
        try:
            whole = folder.resolve()
            name = "/".join(whole.parts[-1 if _version_number(whole) < 0 else -2 :])
            history, resting = _read_history(folder / HISTORY_FILE)
            run = cls(
                name=name, path=folder, config=_read(folder / CONFIG_FILE, _config),
                scores=_read(folder / SCORES_FILE, _scores, f"write it again with `{command_line('score')}`"),
                history=history, resting=resting, metrics=_read_columns(folder / METRICS_FILE, _number),
                texts={title: table for title, file in TEXT_FILES.items() if (table := _read_columns(folder / file, str))},
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"{error.filename}: can't be read ({error.strerror}); give a readable run folder") from error
        for draw in run.history:
            if not all(0 <= block < run.num_layers for block in draw.blocks):
                what = f"interval {draw.interval} has a block that is not among the {run.num_layers} of {SCORES_FILE}"
                raise UsageError(f"{folder / HISTORY_FILE}: {what}; put the files of one run together")
        if not resting and ((run.config or {}).get("sampling") or {}).get("resting_rank"):  # it has no such column
            for draw in history:
                above = range(min(draw.blocks, default=run.num_layers), run.num_layers)
                run.resting[draw.interval] = tuple(block for block in above if block not in draw.blocks)
        return run

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks; without scores, as many as the drawn ones show that there are at least."""
        if self.scores:
            return len(self.scores["probabilities"])
        return 1 + max((block for draw in self.history for block in draw.blocks), default=-1)

    @property
    def never_trained(self) -> list[int]:
        """Blocks that never trained, not at rest either; empty where no blocks were sampled."""
        trained = {block for draw in self.history for block in draw.blocks}.union(*self.resting.values())
        return [block for block in range(self.num_layers) if block not in trained] if self.history else []

    @property
    def last_step(self) -> int:
        """Optimizer steps that the run took, as far as its record tells."""
        logged = self.series("train_loss")[0] + self.series("val_loss")[0]
        # Lightning counts the logged steps from 0.
        return max(int(max(logged, default=-1)) + 1, max((draw.step for draw in self.history), default=0))

    def series(self, column: str, x: str = "step") -> tuple[list[float], list[float]]:
        """A metric's values (second list) by ``x`` (first list), one a step; where ``x`` is missing, it is interpolated."""
        if not {"step", x, column} <= self.metrics.keys():
            return [], []
        steps = [step if step is not None and math.isfinite(step) else None for step in self.metrics["step"]]
        known = {s: at for s, at in zip(steps, self.metrics[x], strict=True) if s is not None and at is not None}
        found = {s: v for s, v in zip(steps, self.metrics[column], strict=True) if s is not None and v is not None}
        if not known or not found:
            return [], []
        positions = np.interp(sorted(found), sorted(known), [known[s] for s in sorted(known)])
        return positions.tolist(), [found[s] for s in sorted(found)]


def newest_run(path: Path) -> Path:
    """The run folder that ``path`` is, or in it the newest ``version_N`` that trained; the path itself if there is no run."""
    runs = [folder for folder in path.glob("version_*") if _version_number(folder) >= 0 and is_run_folder(folder)]
    if is_run_folder(path) or not runs:
        return path
    return max(runs, key=lambda folder: (_has_trained(folder), _version_number(folder)))


def run_containing(model: Path) -> Path | None:
    """The run's folder that a checkpoint or a model's directory lies in, or that the path is; None if it is of no run."""
    parents = model.parents if len(model.parents) > 2 else model.absolute().parents
    return next((folder for folder in (model, *parents[:2]) if (folder / CONFIG_FILE).is_file()), None)


def is_run_folder(path: Path) -> bool:
    """Whether the folder holds any of the files from which a report is made."""
    return any((path / name).is_file() for name in (SCORES_FILE, HISTORY_FILE, METRICS_FILE))


def _has_trained(folder: Path) -> bool:
    """Whether it is of a ``fit``: ``validate`` and ``test`` log into a folder of their own, too."""
    metrics = folder / METRICS_FILE
    columns = metrics.read_text("utf-8", "replace").partition("\n")[0] if metrics.is_file() else ""
    return (folder / HISTORY_FILE).is_file() or "train_loss" in columns


def _version_number(folder: Path) -> int:
    return int(match[1]) if (match := re.fullmatch(r"version_(\d+)", folder.name)) else -1


def _read(path: Path, parse: Callable[[str], T], hint: str = "fix it, or delete it") -> T | None:
    """What a function makes of a file's text; None if there is no file, a UsageError that names the file if it is damaged."""
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return parse(file.read())
    except (ValueError, KeyError, TypeError, csv.Error, yaml.YAMLError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UsageError(f"{path}: damaged ({reason}); {hint}") from error


def _scores(text: str) -> dict[str, Any]:
    scores = json.loads(text)
    ratios, probabilities = scores["outlier_ratios"], scores["probabilities"]
    numbers = [float(number) for number in [*ratios, *probabilities]]
    if not probabilities or len(ratios) != len(probabilities) or not all(map(math.isfinite, numbers)):
        counts = f"{len(ratios)} and {len(probabilities)}"
        raise ValueError(f"outlier_ratios and probabilities need one finite number a block each, they have {counts}")
    return scores


def _config(text: str) -> dict[str, Any] | None:
    config = yaml.safe_load(text)
    if not isinstance(config, dict | None) or not isinstance((config or {}).get("sampling"), dict | None):
        raise ValueError(f"it holds no settings, only {str(config)[:40]!r}")
    return config


def _read_rows(path: Path, convert: Callable[[dict[str, str]], T]) -> list[T]:
    """What a function makes of each row of a CSV file; it gets a cell in every column."""

    def rows(text: str) -> Iterator[T]:
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))  # a kill may cut off the last row
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} does not have {len(reader.fieldnames or [])} cells")
            try:
                yield convert(row)
            except ValueError as error:
                raise ValueError(f"line {reader.line_num}: {error}") from error

    return _read(path, lambda text: [*rows(text)]) or []


def _read_history(path: Path) -> tuple[list[Draw], dict[int, tuple[int, ...]]]:
    def interval(row: dict[str, str]) -> tuple[Draw, tuple[int, ...] | None]:
        active, resting = (tuple(map(int, cell.split())) for cell in (row["blocks"], row.get("resting", "")))
        return Draw(int(row["interval"]), int(row["step"]), active), resting if "resting" in row else None

    # A resumed run writes the interval in which it was cut off again: the later row counts.
    rows = {draw.interval: (draw, resting) for draw, resting in _read_rows(path, interval)}
    return sorted(draw for draw, _ in rows.values()), {n: resting for n, (_, resting) in rows.items() if resting is not None}


def _number(cell: str) -> float | None:
    """A figure of `METRICS_FILE`, where CSVLogger writes truth values as words; None for an empty cell."""
    return float({"True": "1", "False": "0"}.get(cell, cell)) if cell else None


def _read_columns(path: Path, convert: Callable[[str], T]) -> dict[str, list[T]]:
    rows = _read_rows(path, lambda row: {name: convert(cell) for name, cell in row.items()})
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
