"""What a run leaves behind besides checkpoints: a model directory that any tool loads, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ows_lightning.callbacks.model_card import model_card
from ows_lightning.errors import UsageError, not_writable
from ows_lightning.models.export import save_huggingface
from ows_lightning.module import CausalLMModule
from ows_lightning.report import write_pictures
from ows_lightning.sampling.callback import LayerwiseSampling


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of a run: its logger's, or ``default_root_dir``. To be called on all ranks: rank 0 tells it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFolder(Callback):
    """Takes the run's folder for this run alone, and at the end of ``fit`` writes the trained model and pictures into it."""

    _lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the folder.

        Raises:
            UsageError: Another run that still lives writes to it, or it can't be made or written to.
        """
        folder = run_folder(trainer)
        if stage != "fit":
            return
        if (sampling := LayerwiseSampling.of(trainer)) is not None:
            sampling.folder = folder  # also where there is no logger
        if not trainer.is_global_zero:
            return
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(f"{folder}: a run that has not ended writes there; wait, or give another folder") from error
        except OSError as error:  # Timeout is one
            raise not_writable("trainer.default_root_dir", folder, error) from error
        _clear_away(folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``model/`` and the PNGs into the run's folder."""
        folder = run_folder(trainer)
        if isinstance(pl_module, CausalLMModule) and pl_module.model is not None:
            save_huggingface(pl_module.model, pl_module.tokenizer, folder / "model", model_card(pl_module, folder))
        if trainer.is_global_zero:
            _show_in_tensorboard(write_pictures(folder), trainer)


def _clear_away(folder: Path) -> None:
    """Removes the unfinished checkpoints of runs that were killed, in this run's folder and beside it, where none lives."""
    for checkpoints in (folder / "checkpoints", *folder.parent.glob("version_*/checkpoints")):
        unfinished = [*checkpoints.glob(".*.ckpt.partial")]
        lock = FileLock(checkpoints.parent / ".lock")
        try:
            if unfinished and checkpoints.parent != folder:
                lock.acquire(timeout=0)
            for path in unfinished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (Timeout, OSError):
            continue  # it lives, or is another user's
        finally:
            lock.release()


def _show_in_tensorboard(pictures: Sequence[Path], trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for path in pictures:
                logger.experiment.add_image(path.stem, imread(path), trainer.global_step, dataformats="HWC")
