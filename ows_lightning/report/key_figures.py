"""A run's key figures: what to compare runs by, in one row."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ows_lightning.report.run import RunRecord
from ows_lightning.report.tables import Table


def key_figures(run: RunRecord) -> dict[str, Any]:
    """Raw key figures, ``None`` where the run has not recorded one; loss in nats, time in seconds, memory in MB."""
    held_out = run.series("val_loss")[1]
    speed = run.series("tokens_per_second")[1]
    return {
        "run": run.name,
        "model": _find(run.config, "model_name_or_path") or (run.scores or {}).get("model"),
        "sampling": _sampling(run),
        "optimizer": _optimizer(run),
        "steps": run.last_step or None,
        "final_val_loss": _last(held_out),
        "best_val_loss": min(filter(math.isfinite, held_out), default=None),
        "val_exact_match": _last(run.series("val_exact_match")[1]),
        "tokens": _largest(run, "tokens"),
        "time_s": _largest(run, "time_s"),
        "median_tokens_per_second": statistics.median(speed) if speed else None,
        "peak_memory_mb": _largest(run, "peak_memory_mb"),
        "num_layers": run.num_layers or None,
        "blocks_never_trained": " ".join(map(str, run.never_trained)) if run.history else None,
    }


def key_figures_table(runs: list[RunRecord]) -> Table:
    """The key figures of several runs, one row each."""
    rows = [key_figures(run) for run in runs]
    return {column: [row[column] for row in rows] for column in rows[0]}


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _largest(run: RunRecord, column: str) -> float | None:
    return max(filter(math.isfinite, run.series(column)[1]), default=None)


def _sampling(run: RunRecord) -> str | None:
    if not run.history:
        return "none" if run.config and not run.config.get("sampling") else None
    section = (run.config or {}).get("sampling")
    distribution, blocks, steps = (_find(section, key) for key in ("distribution", "activated_layers", "interval_steps"))
    distribution = "own weights" if isinstance(distribution, list) else distribution
    grouping = f", grouping {grouping}" if (grouping := _find(section, "grouping")) else ""
    return f"{distribution}, {blocks} blocks every {steps} steps{grouping}" if section else None


def _optimizer(run: RunRecord) -> str | None:
    model = (run.config or {}).get("model")
    name = str(_find(_find(model, "optimizer"), "class_path") or "").rpartition(".")[2]
    settings = {"lr": _find(model, "lr"), "rank": _find(model, "rank"), "LoRA r": _find(_find(model, "lora"), "r")}
    return ", ".join(filter(None, [name, *(f"{key} {value}" for key, value in settings.items() if value)])) or None


def _find(section: Any, key: str) -> Any:
    """The first value of that name, however deep: a class is written with ``init_args`` or without."""
    if not isinstance(section, dict):
        return None
    if section.get(key) is not None:
        return section[key]
    return next((value for value in (_find(part, key) for part in section.values()) if value is not None), None)
