"""What was found on a card, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.settings import ASLEEP
from benchmarks.loss_head import IMPLEMENTATIONS
from benchmarks.report import markdown

Found = dict[str, Any]


def _given(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)


_COLUMNS: dict[str, tuple[str, list[str], Callable[[Found], list[str]]]] = {
    "step": (
        "Step times",
        ["Method", "Tokens/s", "Mean step (s)", "Median", "Worst", "Steps", "Peak (GB)", "Power (W)",
         "Compute waits for fetches", "Of the copying, hidden"],
        lambda row: [
            f"{row['tokens_per_second']:,.0f}", f"{row['mean_s']:.3f}", f"{row['median_s']:.3f}", f"{row['worst_s']:.3f}",
            str(row["steps"]), f"{row['peak_mb'] / 1000:.2f}", _given(row.get("watts"), ".0f"),
            _given(row.get("stall"), ".1%"), _given(row.get("hidden"), ".0%"),
        ],
    ),
    "waits": (
        "How often the process waits for the device",
        ["Setting", "In a micro-batch", "In a step", "In a step with a draw"],
        lambda row: [_given(row[kind], "d") for kind in ("micro-batch", "step", "draw")],
    ),
    "adversarial": (
        "The same weights, to the bit, while one side of the streams sleeps",
        ["Setting", *(f"{asleep} sleeps" for asleep in ASLEEP)],
        lambda row: ["yes" if row[asleep] else "**no**" for asleep in ASLEEP],
    ),
    "plan": (
        "Peak memory beside what `plan` predicts",
        ["Setting", "Predicted (GB)", "Measured (GB)", "Measured / predicted", "Predicted on the host (GB)"],
        lambda row: [
            f"{row['predicted_mb'] / 1000:.3f}", f"{row['measured_mb'] / 1000:.3f}",
            f"{row['measured_mb'] / row['predicted_mb']:.3f}", f"{row['host_mb'] / 1000:.2f}",
        ],
    ),
    "tests": ("Tests marked `gpu`", ["Command", "Result"], lambda row: ["; ".join([row["summary"], *row["failed"]])]),
    "loss head": (
        "Loss head, forward and backward",
        ["Implementation", "Head", "Median (ms)", "Peak (MB)"],
        lambda row: [row["head"], f"{row['ms']:.4g}", f"{row['peak_mb']:,.0f}"],
    ),
}  # fmt: skip


def as_markdown(about: dict[str, Any], rows: list[Found]) -> str:
    """Returns the report: what it was measured on, and a table a part."""
    versions = ", ".join(f"{name} {about[name]}" for name in about if name in _VERSIONS and about[name])
    card = about["device"]
    if "driver" in about:
        card += f", {about['memory_gb']:.0f} GB, driver {about['driver']}"
    parts = [f"# On a {card}", f"{versions}. Times of {about['model']}, bfloat16, checkpointing."]
    if about["dry_run"]:
        parts.append("**A dry run on a CPU: these figures mean nothing.**")
    if about["missing"]:
        parts.append(f"Not installed, so that some rows are missing: {', '.join(about['missing'])}.")
    for part, (title, header, cells) in _COLUMNS.items():
        lines = []
        for row in (row for row in rows if row["part"] == part):
            name = IMPLEMENTATIONS[row["name"]][0] if part == "loss head" else row["name"]
            filled = [row["error"]] if "error" in row else cells(row)
            lines.append([name, *filled, *[""] * (len(header) - 1 - len(filled))])
        if lines:
            parts += [f"## {title}", markdown(header, lines)]
    return "\n\n".join(parts)


_VERSIONS = ("python", "cuda", "torch", "transformers", "lightning", "peft", "galore-torch", "liger-kernel")
