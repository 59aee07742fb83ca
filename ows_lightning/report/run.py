"""What a run left in its folder, read back without the model or any training code."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ows_lightning.errors import UsageError, command_line

SCORES = "outlier_scores.json"
HISTORY = "sampling_history.csv"
METRICS = "metrics.csv"
CONFIG = "config.yaml"
TEXTS = {"Answers while it trained": "generations.csv", "Base and tuned model": "comparison.csv"}


class Interval(NamedTuple):
    """One draw of blocks: the interval's number, the optimizer step of the draw, and the blocks it activated."""

    interval: int
    step: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class RunRecord:
    """The record of one run: everything the pictures and tables of a report are made from.

    Attributes:
        name: What to call the run in legends and tables.
        path: The run's folder.
        scores: Content of ``outlier_scores.json``, or ``None`` where no blocks were scored. Its ``outlier_ratios``
            (percent) and ``probabilities`` (sum to 1) hold a number for each of ``num_layers`` blocks.
        history: The draws of ``sampling_history.csv`` in order; empty where no blocks were sampled.
        metrics: Columns of ``metrics.csv``, all of one length; ``None`` where a row has no value for a column, because
            Lightning writes a row per logging call and not per step.
        config: Content of ``config.yaml``, or ``None``.
        texts: Tables of texts, by title: answers while it trained, answers of the base model beside those of the tuned one.
    """

    name: str
    path: Path
    scores: dict[str, Any] | None = None
    history: list[Interval] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    texts: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a run folder, or the newest ``version_N`` inside a folder of them.

        Args:
            path: Folder with ``metrics.csv``, ``sampling_history.csv`` or ``outlier_scores.json`` in it, or a folder
                whose ``version_N`` folders are such.

        Raises:
            UsageError: The folder is missing, is not a run's, or one of its files is damaged.
        """
        folder = find_run_folder(Path(path))
        try:
            run = cls(
                name=_run_name(folder),
                path=folder,
                scores=_read_scores(folder / SCORES),
                history=_read_history(folder / HISTORY),
                metrics=_read_metrics(folder / METRICS),
                config=_read_config(folder / CONFIG),
                texts={title: table for title, file in TEXTS.items() if (table := _read_texts(folder / file))},
            )
        except OSError as error:
            raise UsageError(f"{error.filename}: can't be read ({error.strerror}); give a readable run folder") from error
        for draw in run.history:
            if not all(0 <= block < run.num_layers for block in draw.blocks):
                raise UsageError(
                    f"{folder / HISTORY}: interval {draw.interval} has a block that is not among the {run.num_layers} of "
                    f"{SCORES}; put the files of one run together"
                )
        return run

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks; without scores, as many as the drawn ones show that there are at least."""
        if self.scores:
            return len(self.scores["probabilities"])
        return 1 + max((block for draw in self.history for block in draw.blocks), default=-1)

    @property
    def never_trained(self) -> list[int]:
        """Blocks that no interval activated; empty where no blocks were sampled."""
        trained = {block for draw in self.history for block in draw.blocks}
        return [block for block in range(self.num_layers) if block not in trained] if self.history else []

    @property
    def last_step(self) -> int:
        """Optimizer steps that the run took, as far as its record tells."""
        logged = self.series("train_loss")[0] + self.series("val_loss")[0]
        drawn = [draw.step for draw in self.history]
        # Lightning counts the logged steps from 0.
        return max(int(max(logged, default=-1)) + 1, max(drawn, default=0))

    def series(self, column: str, x: str = "step") -> tuple[list[float], list[float]]:
        """A metric's values (second list) against another column (first list), one point a step, in order of steps.

        Validation is logged in rows of its own, without tokens and time: where ``x`` is missing it is interpolated
        between its neighbours by step.
        """
        if not {"step", x, column} <= self.metrics.keys():
            return [], []
        steps = self.metrics["step"]
        known = {s: at for s, at in zip(steps, self.metrics[x], strict=True) if s is not None and at is not None}
        found = {s: v for s, v in zip(steps, self.metrics[column], strict=True) if s is not None and v is not None}
        if not known or not found:
            return [], []
        positions = np.interp(sorted(found), sorted(known), [known[s] for s in sorted(known)])
        return positions.tolist(), [found[s] for s in sorted(found)]


def find_run_folder(path: Path) -> Path:
    """The run folder that ``path`` is, or the newest of the ``version_N`` folders in it.

    Raises:
        UsageError: There is no such folder, or no run in it.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give the folder that `fit` or `score` wrote")
    if is_run_folder(path):
        return path
    versions = [folder for folder in path.glob("version_*") if is_run_folder(folder) and _version_number(folder) is not None]
    if not versions:
        raise UsageError(
            f"{path}: not a run folder, it has no {METRICS}, {HISTORY} or {SCORES}; give the folder that `fit` or "
            "`score` wrote"
        )
    return max(versions, key=lambda folder: _version_number(folder) or 0)


def run_folder_of(model: Path) -> Path | None:
    """The run's folder that a checkpoint or a model's directory lies in, or that the path is; None if it is of no run."""
    parents = model.parents if len(model.parents) > 2 else model.absolute().parents
    return next((folder for folder in (model, *parents[:2]) if (folder / CONFIG).is_file()), None)


def is_run_folder(path: Path) -> bool:
    """Whether the folder holds any of the files from which a report is made."""
    return any((path / name).is_file() for name in (SCORES, HISTORY, METRICS))


def _version_number(folder: Path) -> int | None:
    match = re.fullmatch(r"version_(\d+)", folder.name)
    return int(match[1]) if match else None


def _run_name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.name if _version_number(folder) is None else f"{folder.parent.name}/{folder.name}"


def _read_scores(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        ratios, probabilities = scores["outlier_ratios"], scores["probabilities"]
        numbers = [float(number) for number in [*ratios, *probabilities]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged scores ({error!r}); write them again with `{command_line('score')}`") from error
    if not probabilities or len(ratios) != len(probabilities) or not all(map(math.isfinite, numbers)):
        raise UsageError(
            f"{path}: outlier_ratios and probabilities need one finite number a block each, they have {len(ratios)} "
            f"and {len(probabilities)}; write them again with `{command_line('score')}`"
        )
    return scores


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, each with a cell in every column."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a CSV file ({error}); restore it from the run") from error
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UsageError(f"{path}: line {number} does not have {len(reader.fieldnames or [])} cells; mend the line")
    return rows


def _read_texts(path: Path) -> dict[str, list[str]]:
    rows = _read_rows(path)
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _read_history(path: Path) -> list[Interval]:
    draws = {}
    for number, row in enumerate(_read_rows(path), start=2):
        try:
            draw = Interval(int(row["interval"]), int(row["step"]), tuple(int(block) for block in row["blocks"].split()))
        except KeyError as error:
            raise UsageError(f"{path}: no column {error}; the header is 'interval,step,blocks'") from error
        except ValueError as error:
            raise UsageError(f"{path}: line {number} is damaged ({error}); mend or delete the line") from error
        # A resumed run writes the interval in which it was cut off again: the later row counts.
        draws[draw.interval] = draw
    return sorted(draws.values())


def _read_metrics(path: Path) -> dict[str, list[float | None]]:
    columns: dict[str, list[float | None]] = {}
    for number, row in enumerate(_read_rows(path), start=2):
        for name, cell in row.items():
            try:
                columns.setdefault(name, []).append(float(cell) if cell else None)
            except ValueError as error:
                raise UsageError(
                    f"{path}: line {number}, column {name!r}: {cell!r} is not a number; mend or delete the line"
                ) from error
    return columns


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a YAML file ({reason}); mend or delete it") from error
    if config is not None and not isinstance(config, dict):
        raise UsageError(f"{path}: holds no settings, only {str(config)[:40]!r}; mend or delete it")
    return config
