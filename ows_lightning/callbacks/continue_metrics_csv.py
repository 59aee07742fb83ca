"""The rows that a resumed run had logged before, in its own ``metrics.csv``."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.report.tables import write_csv


class ContinueMetricsCSV(Callback):
    """Copies the rows that were logged up to the checkpoint into ``metrics.csv`` and ``generations.csv`` of a resumed run.

    A run can be killed between saving a step's checkpoint and logging its row, so the checkpoint holds that row, too.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the run's folder, the number of its rows, and this step's row if it is not logged yet."""
        folder = run_folder(trainer)  # asks all ranks
        for logger in trainer.loggers:
            logger.save()  # rows that a CSVLogger of the user's still holds
        file = folder / "metrics.csv"
        logged = max(file.read_bytes().count(b"\n") - 1, 0) if file.is_file() else 0
        checkpoint["curves"] = {"folder": str(folder), "logged": logged, "row": _unlogged_row(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copies the rows, on rank 0."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path and logger is not None and trainer.is_global_zero:
            _copy_rows(Path(trainer.ckpt_path), logger, checkpoint)


def _unlogged_row(trainer: Trainer) -> dict[str, Any] | None:
    """Returns the row that Lightning will log for this step after its callbacks have run; None if it is logged already."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    if batches.completed == batches.processed or loop._should_accumulate() or not connector.should_update_logs:
        return None
    row = convert_tensors_to_scalars(connector.metrics["log"])
    return {**row, "epoch": trainer.current_epoch, "step": loop._batches_that_stepped}


def _copy_rows(path: Path, logger: CSVLogger, checkpoint: Mapping[str, Any]) -> None:
    """Writes the rows up to a checkpoint into the ``metrics.csv`` of the run that resumes it and logs the later ones again."""
    if (saved := checkpoint.get("curves")) is None:  # it was saved without this callback
        return
    before = next((f for f in (path.parent.parent, Path(saved["folder"])) if (f / "metrics.csv").is_file()), None)
    now = Path(logger.log_dir)
    if before is None:
        return

    def rows_of(name: str) -> list[dict[str, Any]]:  # the resumed run repeats a step that was not complete
        with (before / name).open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["step"] and int(float(row["step"])) < checkpoint["global_step"]]

    rows = rows_of("metrics.csv")[: saved["logged"]] + ([saved["row"]] if saved["row"] else [])
    now.mkdir(parents=True, exist_ok=True)
    columns = sorted({key for row in rows for key in row})
    logger.experiment.metrics_keys = columns  # the experiment removes a file that is there
    write_csv({name: [row.get(name) for row in rows] for name in columns}, now / "metrics.csv")
    if (before / "generations.csv").is_file() and (answers := rows_of("generations.csv")):
        write_csv({name: [row[name] for row in answers] for name in answers[0]}, now / "generations.csv")
