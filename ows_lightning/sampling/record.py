"""The files that say which blocks trained, and why: ``outlier_scores.json`` and ``sampling_history.csv``."""

from __future__ import annotations

import csv
from pathlib import Path

from ows_lightning.sampling.sampler import BlockSampler


class SamplingRecord:
    """Writes a sampler's scores and draws into a folder; each draw appends one line.

    Args:
        folder: The folder, made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = 0  # draws in the file
        self._scores: object = None

    def update(self, sampler: BlockSampler) -> None:
        """Writes what is new. The first call of a run replaces what an earlier run left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if sampler.outlier_scores is not None and sampler.outlier_scores is not self._scores:
            sampler.outlier_scores.save(self.folder / "outlier_scores.json")
            self._scores = sampler.outlier_scores
        with (self.folder / "sampling_history.csv").open("a" if self._written else "w", newline="") as file:
            writer = csv.writer(file)
            if not self._written:
                writer.writerow(["interval", "step", "blocks"])
            for interval, step, blocks in sampler.history[self._written :]:
                writer.writerow([interval, step, " ".join(map(str, blocks))])
        self._written = len(sampler.history)
