"""What was found on a card, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.loss_head import IMPLEMENTATIONS
from benchmarks.report import markdown

Found = dict[str, Any]

_COLUMNS: dict[str, tuple[str, list[str], Callable[[Found], list[str]]]] = {
    "step": (
        "Step times",
        ["Method", "Tokens/s", "Mean step (s)", "Median", "Worst", "Steps", "Peak (GB)", "Compute waits for fetches"],
        lambda row: [
            f"{row['tokens_per_second']:,.0f}", f"{row['mean_s']:.3f}", f"{row['median_s']:.3f}", f"{row['worst_s']:.3f}",
            str(row["steps"]), f"{row['peak_mb'] / 1000:.2f}", f"{row['stall']:.1%}" if "stall" in row else "",
        ],
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
