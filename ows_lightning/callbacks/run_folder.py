"""The run's folder: locked while the run lasts; in the end it holds the model in Hugging Face's format, and plots."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.image import imread

from ows_lightning.atomic_files import remove
from ows_lightning.callbacks.run_checkpoint import checkpoint_callback
from ows_lightning.errors import DISK_FULL, UsageError, add_note, not_writable
from ows_lightning.models.export import save_huggingface
from ows_lightning.models.model_directory import check_replaceable
from ows_lightning.module import CausalLMModule
from ows_lightning.report import write_pictures
from ows_lightning.report.model_card import model_card
from ows_lightning.sampling.callback import LayerwiseSampling


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of a run: its logger's, or ``default_root_dir``. Call it on all ranks: rank 0 broadcasts it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunLogger(CSVLogger):
    """Makes the folder of its version when it chooses the number: runs that start together get one each."""

    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while getattr(rank_zero_only, "rank", 0) == 0:  # which tells the others
            with contextlib.suppress(FileExistsError):
                Path(self.root_dir, f"version_{version}").mkdir(parents=True)
                break
            version += 1
        return version


class RunFolder(Callback):
    """Locks the run's folder, and writes the trained model and plots into it at the end of ``fit``."""

    def __init__(self) -> None:
        self._at_end = contextlib.ExitStack()  # unlocks, and gives the sampling callback the folder back that it had before
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Locks the folder; a UsageError if another run that lives writes to it, or it or its ``model/`` can't be written."""
        self._folder = folder = run_folder(trainer)
        if stage != "fit":
            return
        if isinstance(pl_module, CausalLMModule) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_replaceable(folder / "model", pl_module.hparams["model_name_or_path"])  # not only when all is trained
        if (sampling := LayerwiseSampling.of(trainer)) is not None:
            self._at_end.callback(setattr, sampling, "folder", sampling.folder)
            sampling.folder = sampling.folder or folder  # also where there is no logger
        if not trainer.is_global_zero:
            return
        try:
            self._lock(folder)
        except Timeout as error:
            raise UsageError(f"{folder}: a run that has not ended writes there; wait, or give another folder") from error
        except OSError as error:  # Timeout is one
            raise not_writable("trainer.default_root_dir", folder, error) from error
        _remove_unfinished(folder / "checkpoints")
        for checkpoints in set(folder.parent.glob("version_*/checkpoints")) - {folder / "checkpoints"}:  # of killed runs
            with contextlib.suppress(OSError), FileLock(checkpoints.parent / ".lock").acquire(timeout=0):
                _remove_unfinished(checkpoints)
        elsewhere = getattr(checkpoint_callback(trainer), "dirpath", None)
        if elsewhere and "://" not in str(elsewhere) and folder not in Path(elsewhere).absolute().parents:
            with contextlib.suppress(OSError):
                self._lock(Path(elsewhere))
                _remove_unfinished(Path(elsewhere))

    def _lock(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._at_end.enter_context(FileLock(folder / ".lock").acquire(timeout=0))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unlocks the folder; names it in the error of a full disk, which names no file, and tells a user how to go on."""
        if isinstance(exception, OSError) and exception.errno in DISK_FULL and not exception.filename:
            exception.filename = str(self._folder)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == TrainerFn.FITTING:
            paths = (getattr(c, f"{which}_model_path", "") for c in trainer.checkpoint_callbacks for which in ("last", "best"))
            saved = "`--ckpt_path last` goes on from the newest checkpoint" if any(paths) else "no checkpoint was saved yet"
            add_note(exception, saved)
        self._at_end.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._at_end.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # nothing of it is kept
            return
        folder = run_folder(trainer)
        if isinstance(pl_module, CausalLMModule):
            save_huggingface(pl_module.model, pl_module.tokenizer, folder / "model", model_card(pl_module.hparams, folder))
        if not trainer.is_global_zero:
            return
        for path in write_pictures(folder):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(path.stem, imread(path), trainer.global_step, dataformats="HWC")


def _remove_unfinished(checkpoints: Path) -> None:
    """Removes what killed runs left of checkpoints that they were writing."""
    for path in checkpoints.glob(".*.ckpt.partial"):
        with contextlib.suppress(OSError):  # it belongs to another user
            remove(path)
