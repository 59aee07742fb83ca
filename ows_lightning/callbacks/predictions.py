"""Predictions: each answer of ``predict`` becomes a line of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning.callbacks.run_folder import run_folder


class PredictionFile(Callback):
    """Writes each answer of ``predict`` as a line of ``predictions.jsonl`` into the run's folder; a file a rank."""

    _path: Path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates the file."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = folder / f"predictions{rank}.jsonl"
        self._path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Appends a batch's rows: ``prompt``, ``reference``, ``generated``, and the data's other columns."""
        with self._path.open("a", encoding="utf-8") as file:
            for row in outputs:
                known = {key: value for key, value in row.items() if value is not None}
                file.write(json.dumps(known, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints its path."""
        print(f"Written: {self._path}")
