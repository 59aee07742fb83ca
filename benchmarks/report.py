"""What the benchmark's runs say: a table in Markdown and CSV, a plot, and the ratios that matter."""

from __future__ import annotations

import csv
from collections.abc import Callable
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

from benchmarks.methods import METHODS
from benchmarks.models import BatchShape

OURS, PEERS = "#0072B2", "#9AA5B1"

Run: TypeAlias = dict[str, Any]
Runs: TypeAlias = dict[str, list[Run]]
"""Method -> its finished runs, by repeat; see ``worker.measure`` for what a run holds."""


def step_s(run: Run) -> float:
    """Median time of an optimizer step, in seconds."""
    return median(run["seconds"])


def mean_s(run: Run) -> float:
    """Mean time of an optimizer step, in seconds: over draws, as their lowest blocks decide it."""
    return sum(run["seconds"]) / len(run["seconds"])


def worst_over_median(run: Run) -> float:
    """The slowest measured step, in median steps."""
    return max(run["seconds"]) / step_s(run)


def after_a_draw(run: Run) -> float:
    """The first step after a draw, in median steps of the rest of its interval: the longest; NaN where none was measured."""
    every, seconds = run["settings"]["interval"], run["warm_up"] + run["seconds"]
    later = [seconds[start : start + every] for start in range(every, len(seconds), every)]  # the first one holds the warm-up
    return max((first / median(rest) for first, *rest in later if rest), default=float("nan"))


def peak_mb(run: Run) -> float:
    """Peak memory over all steps, warm-up included, in MB (10^6 bytes)."""
    return max(run["interval_peak_mb"])


def above_start_mb(run: Run) -> float:
    """Peak memory above what was held before the first step, in MB."""
    return peak_mb(run) - run["held_mb"]


class Target(NamedTuple):
    """A ratio of two methods, or a figure of one."""

    name: str
    figure: Callable[[Run], float]
    method: str
    peer: str | None
    at_most: float


TARGETS = (
    Target("time a token, ours grouped / LoRA", mean_s, "ours_grouped", "lora", 0.75),
    Target("time a token, ours grouped / full AdamW", mean_s, "ours_grouped", "full", 0.55),
    Target("time a token, ours grouped / ours with grouping 0", mean_s, "ours_grouped", "ours_frozen", 0.90),
    Target("time a token, ours frozen / LoRA", step_s, "ours_frozen", "lora", 0.80),
    Target("time a token, ours frozen / OWS as published", step_s, "ours_frozen", "ows_published", 0.80),
    Target("time a token, ours frozen / full AdamW", step_s, "ours_frozen", "full", 0.55),
    Target("a step, ours frozen / its forward and backward alone", step_s, "ours_frozen", "forward_backward", 1.05),
    Target("a step, ours resting / ours frozen", step_s, "ours_resting", "ours_frozen", 1.06),
    Target("a step, ours resting grouped / ours grouped", step_s, "ours_grouped_resting", "ours_grouped", 1.06),
    Target("peak above start, ours resting / ours frozen", above_start_mb, "ours_resting", "ours_frozen", 1.03),
    Target(
        "peak above start, ours resting grouped / ours grouped", above_start_mb, "ours_grouped_resting", "ours_grouped", 1.03
    ),
    Target("step after a draw / later steps of its interval, ours grouped", after_a_draw, "ours_grouped", None, 1.35),
    Target("step after a draw / later steps of its interval, ours frozen", after_a_draw, "ours_frozen", None, 1.35),
    Target("peak above start, ours frozen / LoRA", above_start_mb, "ours_frozen", "lora", 0.60),
    Target("peak above start, ours low rank / OWS as published", above_start_mb, "ours_low_rank", "ows_published", 0.70),
)


def targets_table(runs: Runs) -> str:
    """The ratios that can be had from these runs beside their targets, as a Markdown table.

    A ratio is taken repeat by repeat, between runs that were made within minutes of each other; shown are the median and
    the range.
    """
    rows = []
    for target in TARGETS:
        mine, peers = _measured(runs, target.method), _measured(runs, target.peer) if target.peer else {}
        values = [
            target.figure(run) / (target.figure(peers[repeat]) if target.peer else 1)
            for repeat, run in mine.items()
            if target.peer is None or repeat in peers
        ]
        if values and not any(map(isnan, values)):
            measured = f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            rows.append([target.name, measured, f"at most {target.at_most:.2f}"])
    return markdown(["Ratio", "Measured", "Target on a CPU"], rows)


def write_report(runs: Runs, settings: dict[str, Any], path: Path) -> None:
    """Writes ``path`` with the endings ``.md``, ``.csv`` and ``.png``.

    Args:
        runs: Finished runs of each method.
        settings: What all runs share.
        path: Where to write, without an ending.
    """
    tokens = BatchShape(*settings["shape"]).tokens
    figures = {method: _figures(runs, method, tokens) for method in runs}
    path.with_suffix(".md").write_text(_description(runs, settings) + "\n\n" + _as_markdown(figures) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in figures.values() for name in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(figures.values())
    measured = {method: row for method, row in figures.items() if "step_s" in row}
    if measured:
        _plot(runs, measured, path.with_suffix(".png"))


def _figures(runs: Runs, method: str, tokens: int) -> dict[str, Any]:
    """One row of the CSV: medians over the repeats, and the range for the step time."""
    measured = list(_measured(runs, method).values())
    row: dict[str, Any] = {"method": METHODS[method][0], "runs": len(measured)}
    errors = [run["error"] for run in runs[method] if "error" in run]
    if errors:
        row["error"] = errors[0]
    if not measured:
        return row
    step = median(map(step_s, measured))
    return {
        **row,
        "step_s": round(step, 4),
        "step_s_min": round(min(map(step_s, measured)), 4),
        "step_s_max": round(max(map(step_s, measured)), 4),
        "worst_step_s": round(median(max(run["seconds"]) for run in measured), 4),
        "worst_over_median": round(median(map(worst_over_median, measured)), 3),
        "tokens_per_second": round(tokens / step, 1),
        "peak_mb": round(median(map(peak_mb, measured))),
        "above_start_mb": round(median(map(above_start_mb, measured))),
        "above_start_mb_min": round(min(map(above_start_mb, measured))),
        "above_start_mb_max": round(max(map(above_start_mb, measured))),
        **{f"peak_mb_interval_{i}": round(value) for i, value in enumerate(_by_interval(measured, "interval_peak_mb"), 1)},
        **{
            f"tensors_mb_interval_{i}": round(value, 1)
            for i, value in enumerate(_by_interval(measured, "interval_tensors_mb"), 1)
        },
    }


def _measured(runs: Runs, method: str) -> dict[int, Run]:
    return {repeat: run for repeat, run in enumerate(runs.get(method, [])) if "seconds" in run}


def _by_interval(measured: list[Run], key: str) -> list[float]:
    return [median(values) for values in zip(*(run[key] for run in measured), strict=True)]


def _description(runs: Runs, settings: dict[str, Any]) -> str:
    machines = [run["machine"] for finished in runs.values() for run in finished if "machine" in run]
    machine = machines[0] if machines else settings["device"]
    return (
        f"{settings['model']} in {settings['dtype']}, {BatchShape(*settings['shape'])} tokens a step; {machine}, "
        f"torch {settings['versions']['torch']}, transformers {settings['versions']['transformers']}. "
        f"{settings['steps']} steps after 3 of warm-up, blocks drawn every {settings['interval']} steps. "
        "Medians over the runs (each in a process of its own), in brackets their range; the worst step is the slowest of a "
        "run. MB are 10^6 bytes; above start: above what is held before the first step; tensors: weights, optimizer state and "
        "whatever else is alive between two steps."
    )


def _as_markdown(figures: dict[str, dict[str, Any]]) -> str:
    header = [
        "Method",
        "Step (s)",
        "Worst / median",
        "Tokens/s",
        "Peak (MB)",
        "Above start (MB)",
        "Tensors after first / last interval (MB)",
    ]
    rows = []
    for row in figures.values():
        if "step_s" not in row:
            rows.append([row["method"], row["error"], *[""] * (len(header) - 2)])
            continue
        tensors = [value for name, value in row.items() if name.startswith("tensors_mb_interval")]
        rows.append(
            [
                row["method"],
                f"{row['step_s']:.3g} ({row['step_s_min']:.3g} to {row['step_s_max']:.3g})",
                f"{row['worst_over_median']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_mb']:,}",
                f"{row['above_start_mb']:,}",
                f"{tensors[0]:,.0f} / {tensors[-1]:,.0f}",
            ]
        )
    return markdown(header, rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _plot(runs: Runs, figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of step time and peak memory, and the tensors that are alive after each interval as lines."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(13, 0.4 * len(figures) + 2), dpi=150, layout="constrained")
    times, memory, growth = fig.subplots(1, 3)
    rows = list(figures.values())
    names = [row["method"] for row in rows]
    colours = [OURS if method.startswith("ours") else PEERS for method in figures]
    below = {"loc": "upper right", "bbox_to_anchor": (1, -0.16), "frameon": False, "fontsize": "small", "borderaxespad": 0}

    spread = [[row["step_s"] - row["step_s_min"] for row in rows], [row["step_s_max"] - row["step_s"] for row in rows]]
    times.barh(names, [row["step_s"] for row in rows], xerr=spread, color=colours, error_kw={"capsize": 2})
    times.plot([row["worst_step_s"] for row in rows], names, "o", color="#D55E00", markersize=4, label="worst step")
    times.set_title("Time of an optimizer step", loc="left")
    times.set_xlabel("seconds")
    times.legend(**below)

    held = [row["peak_mb"] - row["above_start_mb"] for row in rows]
    memory.barh(names, held, color="0.88", label="held before the first step")
    memory.barh(names, [row["above_start_mb"] for row in rows], left=held, color=colours)
    memory.set_title("Peak memory", loc="left")
    memory.set_xlabel("MB")
    memory.set_yticklabels([])
    memory.legend(**below)

    for (method, row), marker in zip(figures.items(), "osD^vP<>X", strict=False):
        tensors = _by_interval(list(_measured(runs, method).values()), "interval_tensors_mb")
        colour = OURS if method.startswith("ours") else "0.45"
        growth.plot(range(1, len(tensors) + 1), tensors, marker=marker, markersize=4, color=colour, label=row["method"])
    growth.set_title("Tensors alive after each interval", loc="left")
    growth.set_xlabel("interval")
    growth.set_ylabel("MB")
    growth.xaxis.get_major_locator().set_params(integer=True)
    growth.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    for ax in (times, memory):
        ax.invert_yaxis()
    for ax in (times, memory, growth):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)
