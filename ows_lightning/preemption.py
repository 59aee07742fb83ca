"""A run that is told to end saves itself first: SIGTERM and SIGUSR1, which clusters send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning.errors import RunError


class SaveOnSignal(Callback):
    """Saves a checkpoint at the end of the optimizer step in which SIGTERM or SIGUSR1 arrived, on any rank, and ends the run.

    Lightning's own handler would save in the midst of a step. Where SLURM requeues, that handler runs then, at the step's end.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, until the Trainer puts back what was there before the run."""
        self._received, self._step = None, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends the run, if a signal arrived and the optimizer has just stepped.

        Raises:
            RunError: On all ranks.
        """
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        if self._received is signal.SIGUSR1 and callable(requeue := self._before[signal.SIGUSR1]):
            requeue(self._received, None)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.log_dir or ".", "checkpoints")
        path = Path(folder, f"interrupted-step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        name = "a signal" if self._received is None else self._received.name
        raise RunError(f"stopped by {name} after step {trainer.global_step}; resume with --ckpt_path {path}")
