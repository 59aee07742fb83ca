"""Pictures of runs in torchmetrics' style.

Each function takes a run or several, draws on the axes ``ax`` or on new ones, and returns ``(fig, ax)``. Where the runs have
no data to draw, it raises a UsageError.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ows_lightning.errors import UsageError
from ows_lightning.report.run import HISTORY_FILE, METRICS_FILE, SCORES_FILE, RunRecord
from ows_lightning.report.tables import XAxis, block_frequency_table, loss_table, metric_table, scores_table

# Okabe and Ito's colours, told apart with every common colour blindness; their yellow is too faint on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
LIGHT_BLUE = "#B3D1E6"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
DOTS: dict[str, Any] = {"color": VERMILLION, "markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5}

# Up to this many intervals have borders of their own; more would hide what they enclose.
MAX_BORDERS = 60
Runs: TypeAlias = RunRecord | Sequence[RunRecord]
SCORE_LABELS = {
    "outlier_ratio_percent": ("outlier ratio", "weights that are outliers (%)"),
    "weight_norm": ("weight norm", "Frobenius norm of the weights"),
    "gradient_norm": ("gradient norm", "mean norm of the gradient per weight"),
}


def plot_scores(run: RunRecord, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Bars of each block's score, and dots for its probability on a second axis; without scores, bars of the probabilities."""
    table = scores_table(run)
    fig, ax = _axes_for(table["block"], run, SCORES_FILE, ax)
    blocks, probabilities = table["block"], [100 * probability for probability in table["probability"]]
    if score := next((name for name in SCORE_LABELS if name in table), None):
        legend, label = SCORE_LABELS[score]
        style_axes(ax, "Block scores", "decoder block", label)
        ax.bar(blocks, table[score], color=SKY, label=legend)
        right = ax.twinx()
        right.plot(blocks, probabilities, "o", label="probability (right)", **DOTS)
        right.axhline(100 / len(blocks), color="0.35", linestyle=":", linewidth=1, label="uniform (right)")
        # The same headroom on both sides: where the scores are the weights, the dots sit on the bars.
        ax.set_ylim(0, 1.12 * max(table[score]))
        right.set_ylim(0, 1.12 * max(probabilities))
        right.set_ylabel("sampling probability (%)")
        right.tick_params(labelsize="small")
        right.spines["top"].set_visible(False)
        _legend(ax, [artist for axis in (ax, right) for artist in axis.get_legend_handles_labels()[0]], outside=True)
    else:
        style_axes(ax, "Sampling probabilities", "decoder block", "sampling probability (%)")
        ax.bar(blocks, probabilities, color=SKY)
    _block_axis(ax, len(blocks))
    return fig, ax


def plot_blocks(run: RunRecord, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Heat map of the blocks that trained, or did at rest (y), over optimizer steps (x); those that never did are shaded."""
    fig, ax = _axes_for(run.history, run, HISTORY_FILE, ax)
    starts = [draw.step for draw in run.history]
    length = starts[-1] - starts[-2] if len(starts) > 1 else 1
    end = max(starts[-1] + 1, run.last_step) if run.metrics else starts[-1] + length
    draws = [(draw.blocks, run.resting.get(draw.interval, ())) for draw in run.history]
    trains = [[2 * (i in active) + (i in resting) for active, resting in draws] for i in range(run.num_layers)]
    rows, colours = np.arange(run.num_layers + 1) - 0.5, ListedColormap(["#EEF3F7", LIGHT_BLUE, BLUE])
    borders: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.6} if len(starts) <= MAX_BORDERS else {"linewidth": 0}
    ax.pcolormesh([*starts, end], rows, trains, cmap=colours, vmin=0, vmax=2, **borders)
    for block in run.never_trained:
        ax.axhspan(block - 0.5, block + 0.5, color=ORANGE, alpha=0.45, linewidth=0)
    handles = [Patch(color=BLUE, label="trains")]
    if run.resting:
        handles.append(Patch(color=LIGHT_BLUE, label="trains at rest"))
    if never := len(run.never_trained):
        handles.append(Patch(color=ORANGE, alpha=0.45, label=f"never trained ({never} of {run.num_layers})"))
    style_axes(ax, "Blocks by interval", "optimizer step", "decoder block", grid=False)
    _block_axis(ax, run.num_layers, vertical=True)
    _legend(ax, handles, outside=True)
    return fig, ax


def plot_block_frequency(run: RunRecord, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Share of the intervals in which each block trained, and the expected one, with two standard deviations of chance."""
    table = block_frequency_table(run)
    fig, ax = _axes_for(table["block"], run, HISTORY_FILE, ax)
    realised = [100 * share for share in table["realised_share"]]
    ax.bar(table["block"], realised, color=SKY, label=f"realised in {len(run.history)} intervals")
    top = max(realised)
    if table["expected_share"][0] is not None:
        expected = np.array(table["expected_share"], dtype=float)
        spread = 2 * np.sqrt(expected * (1 - expected).clip(0) / len(run.history))
        low, high = (expected - spread).clip(0), (expected + spread).clip(max=1)
        whiskers = 100 * np.stack([expected - low, high - expected])
        look: dict[str, Any] = {"fmt": "o", "elinewidth": 0.9, "label": "expected ± 2 s.d.", **DOTS}
        ax.errorbar(table["block"], 100 * expected, yerr=whiskers, **look)
        top = max(top, 100 * high.max())
    ax.set_ylim(0, 1.12 * top)
    style_axes(ax, "How often each block trained", "decoder block", "share of the intervals (%)")
    _block_axis(ax, run.num_layers)
    _legend(ax, outside=True)
    return fig, ax


def plot_loss(runs: Runs, x: XAxis = "step", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Training loss (thin line) and validation loss (with markers) of one run or several, over steps, tokens or time."""
    runs = _as_runs(runs)
    table = loss_table(runs, x)
    fig, ax = _axes_for(table["loss"], runs, METRICS_FILE, ax)
    scale, label = _unit(x, max(table[x]))
    for number, run in enumerate(runs):
        steps, losses = run.series("train_loss", x)
        alone = not run.series("val_loss", x)[1]
        ax.plot(np.multiply(steps, scale), losses, color=_style(number)["color"], linewidth=1, alpha=1 if alone else 0.45)
        steps, losses = run.series("val_loss", x)
        ax.plot(np.multiply(steps, scale), losses, markevery=math.ceil(len(losses) / 25) or 1, **_style(number))
    style_axes(ax, f"Loss by {label.partition(' (')[0]}", label, "loss (nats per target token)")
    color = BLUE if len(runs) == 1 else "0.4"
    lines = {
        "train": Line2D([], [], label="training", alpha=0.45, linewidth=1, color=color),
        "validation": Line2D([], [], label="validation", **{**_style(0), "color": color}),
    }
    _legend(ax, [*_run_handles(runs), *(line for split, line in lines.items() if split in table["split"])])
    return fig, ax


def plot_memory(runs: Runs, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The run's peak memory up to each optimizer step, of one run or several; for one, lines mark where blocks were drawn."""
    fig, ax = _plot_metric(runs, "peak_memory_mb", "Peak memory so far", "peak memory so far (MB)", ax)
    runs = _as_runs(runs)
    if len(runs) == 1 and 0 < len(runs[0].history) <= MAX_BORDERS:
        starts = [draw.step for draw in runs[0].history]
        ax.vlines(starts, 0, ax.get_ylim()[1], color="0.7", linewidth=0.8, linestyle=":", label="blocks drawn", zorder=0)
        _legend(ax, outside=True)
    return fig, ax


def plot_throughput(runs: Runs, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Tokens per second by optimizer step of one run or several."""
    return _plot_metric(runs, "tokens_per_second", "Throughput", "tokens per second", ax)


def _plot_metric(runs: Runs, metric: str, title: str, label: str, ax: Axes | None) -> tuple[Figure, Axes]:
    runs = _as_runs(runs)
    fig, ax = _axes_for(metric_table(runs, metric)[metric], runs, METRICS_FILE, ax)
    for number, run in enumerate(runs):
        steps, values = run.series(metric)
        ax.plot(steps, values, markevery=math.ceil(len(values) / 25) or 1, **{**_style(number), "linewidth": 1.2})
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.yaxis.set_major_formatter("{x:,.0f}")
    style_axes(ax, title, "optimizer step", label)
    _legend(ax, _run_handles(runs))
    return fig, ax


def _as_runs(runs: Runs) -> list[RunRecord]:
    return [runs] if isinstance(runs, RunRecord) else list(runs)


def _axes_for(rows: Sequence[Any], runs: Runs, file: str, ax: Axes | None) -> tuple[Figure, Axes]:
    """The axes to draw rows on that a file of the runs gave; a UsageError where there are none."""
    if not rows:
        names = ", ".join(run.name for run in _as_runs(runs)) or "no run"
        raise UsageError(f"{names}: nothing to draw, {file} is missing or has no such numbers; give a run that has them")
    return figure_and_axes(ax)


def figure_and_axes(ax: Axes | None) -> tuple[Any, Axes]:
    """The axes that are given and their figure, or new ones."""
    if ax is not None:
        return ax.get_figure(root=True), ax
    # Not pyplot: it keeps every figure, and picks a window system where there is one.
    fig = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    return fig, fig.add_subplot()


def style_axes(ax: Axes, title: str, x: str, y: str, grid: bool = True) -> None:
    """Writes the title and the names of the axes, and takes away what is no data."""
    ax.set_title(title, loc="left", fontsize="large", fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis="y", color="0.88", linewidth=0.8)


def _block_axis(ax: Axes, num_layers: int, vertical: bool = False) -> None:
    ax.locator_params(axis="y" if vertical else "x", nbins=16, integer=True, steps=[1, 2, 4, 5, 10])
    (ax.set_ylim if vertical else ax.set_xlim)(-0.6, num_layers - 0.4)


def _legend(ax: Axes, handles: Sequence[Any] | None = None, outside: bool = False) -> None:
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if not handles:
        return
    place: dict[str, Any] = {"loc": "best", "framealpha": 0.85, "edgecolor": "none"}
    if outside or len(handles) > 5:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3, "borderaxespad": 0.2, "frameon": False}
    ax.legend(handles=handles, fontsize="small", **place)


def _style(number: int) -> dict[str, Any]:
    """The colour and the marker of a run; beyond seven runs also another line."""
    line, look = divmod(number, len(COLOURS))
    drawn = {"color": COLOURS[look], "marker": MARKERS[look], "linestyle": LINES[line % len(LINES)]}
    return {**drawn, "linewidth": 1.6, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}


def _run_handles(runs: Sequence[RunRecord]) -> list[Any]:
    names = [run.name.replace("$", r"\$") for run in runs] if len(runs) > 1 else []
    return [Line2D([], [], label=name, **_style(number)) for number, name in enumerate(names)]


def _unit(x: XAxis, largest: float) -> tuple[float, str]:
    if x == "step":
        return 1, "optimizer step"
    if x == "tokens":
        power = max(0, min(3, int(math.log10(max(largest, 1)) // 3)))
        return 1000.0**-power, "training tokens" + ("", " (thousands)", " (millions)", " (billions)")[power]
    if largest >= 3 * 3600:
        return 1 / 3600, "time (hours)"
    return (1 / 60, "time (minutes)") if largest >= 300 else (1, "time (seconds)")
