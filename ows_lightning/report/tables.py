"""A run's key figures, and the numbers behind each picture, by column, as they are written beside it as CSV."""

import csv
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ows_lightning.report.run import RunRecord
from ows_lightning.sampling.distributions import stored_score_name
from ows_lightning.sampling.inclusion import inclusion_probabilities, window_inclusion_probabilities

Table: TypeAlias = dict[str, list[Any]]  # columns of one length; a table without rows: the run has no such data
XAxis = Literal["step", "tokens", "time_s"]
LABELS = {
    "run": "Run", "model": "Model", "sampling": "Sampling", "optimizer": "Optimizer", "steps": "Optimizer steps",
    "final_val_loss": "Last validation loss", "best_val_loss": "Best validation loss",
    "val_exact_match": "Validation exact match", "tokens": "Training tokens", "time_s": "Time (h:mm:ss)",
    "median_tokens_per_second": "Tokens/s, median", "peak_memory_mb": "Peak memory",
    "blocks_never_trained": "Blocks never trained",
}  # fmt: skip
UNKNOWN = "n/a"
_FORMATS: dict[str, Callable[[Any], str]] = {
    "model": lambda name: "/".join(str(name).split("/")[-2:]), "val_exact_match": lambda share: f"{100 * share:.1f} %",
    "final_val_loss": "{:.4f}".format, "best_val_loss": "{:.4f}".format, "peak_memory_mb": "{:,.0f} MB".format,
    "time_s": lambda seconds: f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02}:{round(seconds) % 60:02}",
}  # fmt: skip


def scores_table(run: RunRecord) -> Table:
    """Each block's score, a ratio in percent or a norm, and sampling probability (0 to 1); no scores if none were needed."""
    if not run.scores:
        return {"block": [], "probability": []}
    table: Table = {"block": list(range(run.num_layers))}
    if any(run.scores["outlier_ratios"]):
        table[stored_score_name(run.scores.get("distribution", "outlier"))] = list(run.scores["outlier_ratios"])
    return {**table, "probability": list(run.scores["probabilities"])}


def blocks_table(run: RunRecord) -> Table:
    """The draws as ``sampling_history.csv`` has them."""
    rows = [(draw.interval, draw.step, " ".join(map(str, draw.blocks))) for draw in run.history]
    resting = {"resting": [" ".join(map(str, run.resting.get(draw.interval, ()))) for draw in run.history]}
    return _table(("interval", "step", "blocks"), rows) | (resting if run.resting else {})


def block_frequency_table(run: RunRecord) -> Table:
    """Share of the intervals in which each block trained, and the share that its probability makes expect (0 to 1)."""
    if not run.history:
        return {"block": [], "intervals": [], "realised_share": [], "expected_share": []}
    counts, blocks = Counter(block for draw in run.history for block in draw.blocks), range(run.num_layers)
    expected: list[float | None] = [None] * run.num_layers
    distribution = (run.scores or {}).get("distribution")
    if run.scores and distribution != "gradient_norm" and not _find_key(run.config, "rescore_every"):  # else they changed
        sizes = Counter(len(draw.blocks) for draw in run.history)
        chances = window_inclusion_probabilities if distribution == "window" else inclusion_probabilities
        shares = [n * chances(run.scores["probabilities"], size) for size, n in sizes.items()]
        expected = (np.sum(shares, axis=0) / len(run.history)).tolist()
    counted = [counts[block] for block in blocks]
    realised = [count / len(run.history) for count in counted]
    return {"block": list(blocks), "intervals": counted, "realised_share": realised, "expected_share": expected}


def loss_table(runs: Sequence[RunRecord], x: XAxis = "step") -> Table:
    """Training and validation loss (nats per target token), one row for each logged value."""
    rows = [
        (run.name, at if x == "time_s" else round(at), split, loss)
        for run in runs
        for split, column in (("train", "train_loss"), ("validation", "val_loss"))
        for at, loss in zip(*run.series(column, x), strict=True)
    ]
    return _table(("run", x, "split", "loss"), rows)


def metric_table(runs: Sequence[RunRecord], metric: str) -> Table:
    """One metric by optimizer step."""
    rows = [(run.name, round(step), value) for run in runs for step, value in zip(*run.series(metric), strict=True)]
    return _table(("run", "step", metric), rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def write_csv(table: Table, path: Path) -> None:
    """Writes a table; numbers keep all their digits, a missing one is an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def key_figures(run: RunRecord) -> dict[str, Any]:
    """Raw key figures, ``None`` where the run has not recorded one; loss in nats, time in seconds, memory in MB."""
    validation, speed = (run.series(metric)[1] for metric in ("val_loss", "tokens_per_second"))
    return {
        "run": run.name,
        "model": _find_key(run.config, "model_name_or_path") or (run.scores or {}).get("model"),
        "sampling": _sampling(run),
        "optimizer": _optimizer(run),
        "steps": run.last_step or None,
        "final_val_loss": next(reversed(validation), None),
        "best_val_loss": min(filter(math.isfinite, validation), default=None),
        "val_exact_match": next(reversed(run.series("val_exact_match")[1]), None),
        "tokens": _largest(run, "tokens"),
        "time_s": _largest(run, "time_s"),
        "median_tokens_per_second": statistics.median(speed) if speed else None,
        "peak_memory_mb": _largest(run, "peak_memory_mb"),
        "num_layers": run.num_layers or None,
        "blocks_never_trained": " ".join(map(str, run.never_trained)) if run.history else None,
    }


def _largest(run: RunRecord, column: str) -> float | None:
    return max(filter(math.isfinite, run.series(column)[1]), default=None)


def _sampling(run: RunRecord) -> str | None:
    if not run.history:
        return "none" if run.config and not run.config.get("sampling") else None
    section = (run.config or {}).get("sampling")
    distribution, blocks, steps = (_find_key(section, key) for key in ("distribution", "activated_layers", "interval_steps"))
    distribution = "own weights" if isinstance(distribution, list) else distribution
    more = "".join(f", {key} {value}" for key in ("grouping", "resting_rank") if (value := _find_key(section, key)))
    return f"{distribution}, {blocks} blocks every {steps} steps{more}" if section else None


def _optimizer(run: RunRecord) -> str | None:
    model = (run.config or {}).get("model")
    name = str(_find_key(_find_key(model, "optimizer"), "class_path") or "").rpartition(".")[2]
    rank = _find_key(_find_key(model, "lora"), "r")
    settings = {"lr": _find_key(model, "lr"), "rank": _find_key(model, "rank"), "LoRA r": rank}
    return ", ".join(filter(None, [name, *(f"{key} {value}" for key, value in settings.items() if value)])) or None


def _find_key(section: Any, key: str) -> Any:
    """The first value of that name, however deep: a class is written with ``init_args`` or without."""
    if not isinstance(section, dict):
        return None
    if section.get(key) is not None:
        return section[key]
    return next((value for value in (_find_key(part, key) for part in section.values()) if value is not None), None)


def formatted(key: str, row: dict[str, Any], every_block: bool = True) -> str:
    """A key figure as a reader wants it, with its unit; ``every_block`` names the blocks and not only their number."""
    value = row[key]
    if value is None:
        return UNKNOWN
    if key == "blocks_never_trained":
        blocks = value.split()
        return f"{len(blocks)} of {row['num_layers']}" + (f": {', '.join(blocks)}" if blocks and every_block else "")
    return _FORMATS[key](value) if key in _FORMATS else value if isinstance(value, str) else f"{value:,.0f}"
