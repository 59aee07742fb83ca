"""ModelCheckpoint whose ``last.ckpt`` takes no extra space, and which removes superseded checkpoints of interrupted runs."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from ows_lightning.checkpoints.files import partial_path, replace_atomically


def run_checkpoint(trainer: Trainer) -> Checkpoint | None:
    """Returns a Trainer's RunCheckpoint, in whose folder ``--ckpt_path last`` looks, or else its first ``Checkpoint``."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint)), trainer.checkpoint_callback)


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose ``last.ckpt`` is made of hard links to the checkpoint that was just saved, if there is one.

    A hard link stays when the checkpoint is removed, being no longer among the best, and needs no second writing. Where
    the file system has none, or the newest checkpoint is not among the best, ``last.ckpt`` is written as a whole; so it is
    before the first validation, where Lightning would save nothing, since what ``monitor`` names is not there yet.
    """

    def on_train_batch_end(self, trainer: Trainer, *batch: Any) -> None:
        """Saves ``last.ckpt`` although the best has to wait for a validation."""
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, *batch)
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            saved = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved  # or the validation of this step would find that all is saved
        self._defer_save_until_validation |= waited

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning 2.6 saves `last.ckpt` at its end
            return
        newest = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        is_last = filepath == self.last_model_path and newest not in ("", filepath)
        if not (is_last and self._link(trainer, Path(newest), Path(filepath))):
            super()._save_checkpoint(trainer, filepath)
        remove_interrupted(trainer, Path(filepath))

    @staticmethod
    def _link(trainer: Trainer, newest: Path, path: Path) -> bool:
        """Makes the link on rank 0; returns whether that worked."""
        linked = False
        if trainer.is_global_zero and newest.exists():
            partial = partial_path(path)
            try:
                if newest.is_dir():
                    shutil.copytree(newest, partial, copy_function=os.link)
                else:
                    partial.unlink(missing_ok=True)
                    os.link(newest, partial)
                replace_atomically(partial, path)
                linked = True
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                partial.unlink(missing_ok=True)
        return bool(trainer.strategy.broadcast(linked))


def remove_interrupted(trainer: Trainer, saved: Path) -> None:
    """Removes ``interrupted-step=N.ckpt`` of this run, and the one it was resumed from, once a later checkpoint is saved."""
    if not trainer.is_global_zero or not saved.exists():
        return
    resumed = Path(trainer.ckpt_path or "")
    for path in {*saved.parent.glob("interrupted-step=*.ckpt"), resumed} - {saved}:
        if path.name.startswith("interrupted-step=") and path.exists():
            trainer.strategy.remove_checkpoint(path)
