"""What a run leaves behind besides checkpoints: a model directory that any tool loads, and pictures."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ows_lightning.errors import DISK_FULL, UsageError, not_writable
from ows_lightning.models.export import save_huggingface
from ows_lightning.module import CausalLMModule
from ows_lightning.report import write_pictures
from ows_lightning.report.model_card import model_card
from ows_lightning.sampling.callback import LayerwiseSampling


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of a run: its logger's, or ``default_root_dir``. To be called on all ranks: rank 0 tells it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFolder(Callback):
    """Takes the run's folder for this run alone, and at the end of ``fit`` writes the trained model and pictures into it."""

    def __init__(self) -> None:
        self._locks: list[FileLock] = []
        self._sampling: tuple[LayerwiseSampling, Path | None] | None = None  # and the folder that it had before
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the folder.

        Raises:
            UsageError: Another run that still lives writes to it, or it can't be made or written to.
        """
        self._folder = folder = run_folder(trainer)
        if stage != "fit":
            return
        if (sampling := LayerwiseSampling.of(trainer)) is not None:
            self._sampling = sampling, sampling.folder
            sampling.folder = folder  # also where there is no logger
        if not trainer.is_global_zero:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._locks = [FileLock(folder / ".lock")]
            self._locks[0].acquire(timeout=0)
        except Timeout as error:
            raise UsageError(f"{folder}: a run that has not ended writes there; wait, or give another folder") from error
        except OSError as error:  # Timeout is one
            raise not_writable("trainer.default_root_dir", folder, error) from error
        _clear_away(folder)
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        if checkpoints and "://" not in str(checkpoints) and folder not in Path(checkpoints).absolute().parents:
            self._take(Path(checkpoints))

    def _take(self, checkpoints: Path) -> None:
        """Clears away in a folder of checkpoints that lies elsewhere, unless another run saves there."""
        with contextlib.suppress(Timeout, OSError):
            checkpoints.mkdir(parents=True, exist_ok=True)
            self._locks.append(FileLock(checkpoints / ".lock"))
            self._locks[-1].acquire(timeout=0)
            _remove_unfinished(checkpoints)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the folder back, and names it where its disk is full: what can't be written to an open file does not."""
        if isinstance(exception, OSError) and exception.errno in DISK_FULL and not exception.filename:
            exception.filename = str(self._folder)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the folder back, and the sampling callback the one that it had."""
        if self._sampling is not None:
            sampling, folder = self._sampling
            sampling.folder, self._sampling = folder, None
        for lock in self._locks:
            lock.release()
        self._locks = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``model/`` and the PNGs into the run's folder."""
        folder = run_folder(trainer)
        if isinstance(pl_module, CausalLMModule) and pl_module.model is not None:
            save_huggingface(pl_module.model, pl_module.tokenizer, folder / "model", model_card(pl_module.hparams, folder))
        if trainer.is_global_zero:
            _show_in_tensorboard(write_pictures(folder), trainer)


def _clear_away(folder: Path) -> None:
    """Removes unfinished checkpoints of killed runs, in this run's folder and in its siblings that no run uses."""
    for checkpoints in (folder / "checkpoints", *folder.parent.glob("version_*/checkpoints")):
        lock = FileLock(checkpoints.parent / ".lock")
        try:
            if checkpoints.parent != folder:
                lock.acquire(timeout=0)
            _remove_unfinished(checkpoints)
        except (Timeout, OSError):
            continue  # a run still uses it, or it belongs to another user
        finally:
            lock.release()


def _remove_unfinished(checkpoints: Path) -> None:
    for path in checkpoints.glob(".*.ckpt.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _show_in_tensorboard(pictures: Sequence[Path], trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            for path in pictures:
                logger.experiment.add_image(path.stem, imread(path), trainer.global_step, dataformats="HWC")
