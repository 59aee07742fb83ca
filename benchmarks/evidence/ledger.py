"""The raw numbers: a row a run, in CSV files that are committed, and from which alone a study goes on."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

COUNTED = (
    "task", "method", "lr", "seed", "steps", "target_tokens", "test_loss", "test_metric", "forgetting", "time_s", "flops",
    "peak_mb", "commit",
)  # fmt: skip
"""Columns of ``STUDY.csv``. Losses in nats a target token; the metric is exact match or accuracy, 0 to 1; forgetting is the
loss on unrelated text; seconds those of training, of a run that had the machine to itself, made again for them if need be;
FLOPs those of the whole run; MB are 10^6 bytes."""

TUNED = ("task", "method", "lr", "seed", "steps", "validation_loss", "commit")
"""Columns of ``STUDY_rates.csv``: the runs that chose the learning rates."""


class Ledger:
    """A CSV file to which rows are added as runs end; rows of one key are there once."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        self._lock = threading.Lock()
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def find(self, **key: Any) -> dict[str, str] | None:
        """Returns the row with these values, if there is one."""
        wanted = {name: as_text(value) for name, value in key.items()}
        return next((row for row in self.rows if all(row[name] == value for name, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, str]:
        """Adds a row, on the disk at once."""
        text = {name: as_text(row[name]) for name in self.columns}
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.is_file()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(text)
            self.rows.append(text)
        return text

    def fill(self, row: dict[str, str], **values: Any) -> None:
        """Writes what a row lacks; no other process may add rows meanwhile."""
        with self._lock:
            row.update((name, as_text(value)) for name, value in values.items())
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)


def as_text(value: Any) -> str:
    """How a value stands in the file: floats with six digits."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
