"""The numbers behind each picture, by column: what is drawn is what is written beside the picture as CSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ows_lightning.report.run import RunRecord
from ows_lightning.sampling.inclusion import inclusion_probabilities, window_inclusion

Table: TypeAlias = dict[str, list[Any]]
"""Columns of one length; a table without rows means that the run has no such data."""

XAxis = Literal["step", "tokens", "time_s"]


def as_runs(runs: RunRecord | Sequence[RunRecord]) -> list[RunRecord]:
    """One run or several, as a list."""
    return [runs] if isinstance(runs, RunRecord) else list(runs)


def scores_table(run: RunRecord) -> Table:
    """Each block's score and sampling probability (0 to 1).

    The score is the outlier ratio in percent, the norm of the weights where these were sampled by it, and left out
    where the distribution needed none (the file then has zeros).
    """
    if not run.scores:
        return {"block": [], "probability": []}
    table: Table = {"block": list(range(run.num_layers))}
    if any(run.scores["outlier_ratios"]):
        distribution = run.scores.get("distribution")
        name = distribution if distribution in ("weight_norm", "gradient_norm") else "outlier_ratio_percent"
        table[name] = list(run.scores["outlier_ratios"])
    return {**table, "probability": list(run.scores["probabilities"])}


def blocks_table(run: RunRecord) -> Table:
    """The draws as ``sampling_history.csv`` has them."""
    return {
        "interval": [draw.interval for draw in run.history],
        "step": [draw.step for draw in run.history],
        "blocks": [" ".join(map(str, draw.blocks)) for draw in run.history],
    }


def block_frequency_table(run: RunRecord) -> Table:
    """Share of the intervals in which each block trained, and the share that its probability makes expect (0 to 1)."""
    if not run.history:
        return {"block": [], "intervals": [], "realised_share": [], "expected_share": []}
    counts = Counter(block for draw in run.history for block in draw.blocks)
    blocks = range(run.num_layers)
    expected: list[float | None] = [None] * run.num_layers
    distribution = (run.scores or {}).get("distribution")
    if run.scores and distribution != "gradient_norm":  # its probabilities change from draw to draw
        sizes = Counter(len(draw.blocks) for draw in run.history)
        chances = window_inclusion if distribution == "window" else inclusion_probabilities
        shares = [n * chances(run.scores["probabilities"], size) for size, n in sizes.items()]
        expected = (np.sum(shares, axis=0) / len(run.history)).tolist()
    return {
        "block": list(blocks),
        "intervals": [counts[block] for block in blocks],
        "realised_share": [counts[block] / len(run.history) for block in blocks],
        "expected_share": expected,
    }


def loss_table(runs: RunRecord | Sequence[RunRecord], x: XAxis = "step") -> Table:
    """Training and held-out loss (nats per target token), one row for each logged value."""
    table: Table = {"run": [], x: [], "split": [], "loss": []}
    for run in as_runs(runs):
        for split, column in (("train", "train_loss"), ("held-out", "val_loss")):
            positions, losses = run.series(column, x)
            table["run"] += [run.name] * len(losses)
            table[x] += positions if x == "time_s" else [round(position) for position in positions]
            table["split"] += [split] * len(losses)
            table["loss"] += losses
    return table


def metric_table(runs: RunRecord | Sequence[RunRecord], metric: str) -> Table:
    """One metric by optimizer step."""
    table: Table = {"run": [], "step": [], metric: []}
    for run in as_runs(runs):
        steps, values = run.series(metric)
        table["run"] += [run.name] * len(values)
        table["step"] += [round(step) for step in steps]
        table[metric] += values
    return table


def write_csv(table: Table, path: Path) -> None:
    """Write a table; numbers keep all their digits, a missing one is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
