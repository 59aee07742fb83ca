"""ModelCheckpoint whose ``last.ckpt`` takes no extra space, and which removes superseded checkpoints of interrupted runs."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor

from ows_lightning.atomic_files import partial_path, remove, replace_atomically
from ows_lightning.callbacks.step_callback import StepCallback
from ows_lightning.checkpoints.files import META_FILE
from ows_lightning.checkpoints.io import AtomicCheckpointIO
from ows_lightning.compat import logged_in_validation


def checkpoint_callback(trainer: Trainer) -> Checkpoint | None:
    """Returns a Trainer's RunCheckpoint, in whose folder ``--ckpt_path last`` looks, or else its first ``Checkpoint``."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint)), trainer.checkpoint_callback)


class RunCheckpoint(StepCallback, ModelCheckpoint):
    """ModelCheckpoint whose ``last.ckpt`` is made of hard links to the checkpoint that was just saved, if there is one.

    A hard link stays when the checkpoint is removed, being no longer among the best, and needs no second writing. Where
    the file system has none, or the newest checkpoint is not among the best, ``last.ckpt`` is written as a whole. It is also
    written between validations, while the best has to wait: until the next one ``monitor`` is of the validation before.
    """

    _between_validations = False
    _last_saved_at: int | None = None  # the step that ``last.ckpt`` is of, although a validation may save it again
    _loaded_steps_seen: int | None = None  # of the state that is resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes ``save_last: link`` for True: its own links outlive the files that they are made of."""
        if self.save_last == "link":
            self.save_last = True
        self._last_saved_at = self._loaded_steps_seen = None  # of an earlier run
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates the ``last.ckpt`` that a run is resumed from: the state in it is from before its own path was known."""
        super().on_train_start(trainer, pl_module)
        every, step = self._every_n_train_steps, trainer.global_step
        if self._loaded_steps_seen not in (None, step) and self.monitor and every and step % every == 0:
            self._defer_save_until_validation = True  # the step ended by a signal, before this callback saw it
        last = Path(self.dirpath or "", f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        paths = (last, Path(trainer.ckpt_path or ""))
        files = [path / META_FILE if path.is_dir() else path for path in paths]  # a folder's are linked one by one
        if not self.last_model_path and all(file.is_file() for file in files) and files[0].samefile(files[1]):
            self.last_model_path = str(last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves ``last.ckpt`` at the run's end, too, before any callback replaces the weights by their average."""
        super().on_train_epoch_end(trainer, pl_module)
        ends = (trainer.should_stop and trainer.fit_loop._can_stop_early) or trainer.current_epoch + 1 == trainer.max_epochs
        if ends and self._last_saved_at != trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves ``last.ckpt`` although the best has to wait for a validation, and where the run ends within an epoch."""
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        self._between_validations = True
        ModelCheckpoint.on_train_batch_end(self, trainer, pl_module, None, None, 0)  # it looks at no batch
        deferred = self._defer_save_until_validation
        self._defer_save_until_validation |= waited  # before the state is saved
        ends = (trainer.should_stop and trainer.fit_loop._can_stop_early) or 0 <= trainer.max_steps <= trainer.global_step
        if (deferred or ends) and not self._should_skip_saving_checkpoint(trainer):
            saved, self._last_saved_at = self._last_global_step_saved, trainer.global_step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved  # or the validation of this step would find that all is saved
        self._between_validations = False

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        stale = logged_in_validation(trainer) if self._between_validations else ()
        return {name: value for name, value in super()._monitor_candidates(trainer).items() if name not in stale}

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:  # where Lightning 2.6 forgets the best that waits
        waits = self._defer_save_until_validation and self._save_on_train_epoch_end is None
        return not waits and super()._should_save_on_train_epoch_end(trainer)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._defer_save_until_validation = False  # Lightning would set it after the state is saved
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # Of a step that is not among the best, Lightning 2.6 leaves `last.ckpt` as it is.
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, monitor_candidates)

    def state_dict(self) -> dict[str, Any]:
        own = {"waits_for_validation": self._defer_save_until_validation, "steps_seen": self._steps_seen}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded_steps_seen = state_dict.get("steps_seen")
        self._defer_save_until_validation = state_dict.get("waits_for_validation", False)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning 2.6 saves `last.ckpt` at its end
            return
        newest = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        if newest == filepath:  # `last.ckpt` again
            return
        if not (newest and filepath == self.last_model_path and self._link(trainer, Path(newest), Path(filepath))):
            path, is_atomic = Path(filepath), isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
            if trainer.is_global_zero and not is_atomic and path.is_file() and path.stat().st_nlink > 1:
                path.unlink()  # what writes in place would write into the other file, too
            super()._save_checkpoint(trainer, filepath)
        if not self.save_weights_only:
            remove_interrupted(trainer, Path(filepath))

    @staticmethod
    def _link(trainer: Trainer, newest: Path, path: Path) -> bool:
        """Makes a hard link, or a folder of them, on rank 0; returns whether that worked."""
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
                remove(partial)
        return bool(trainer.strategy.broadcast(linked))


def remove_interrupted(trainer: Trainer, saved: Path) -> None:
    """Removes the ``interrupted-step=N.ckpt`` of its own folder, or an earlier run's, that a run was resumed from."""
    if not trainer.is_global_zero or not saved.exists():
        return
    resumed, saved = Path(trainer.ckpt_path or "").absolute(), saved.absolute()
    of_earlier_run = resumed.match("version_*/checkpoints/*") and resumed.parents[2] == saved.parent.parent.parent
    if resumed.match("interrupted-step=*.ckpt") and resumed != saved and (of_earlier_run or resumed.parent == saved.parent):
        with contextlib.suppress(OSError):
            trainer.strategy.remove_checkpoint(resumed)
