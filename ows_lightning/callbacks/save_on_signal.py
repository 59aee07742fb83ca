"""A run that is told to end saves itself first: SIGTERM and SIGUSR1, which clusters send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning.callbacks.run_checkpoint import remove_interrupted
from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.errors import RunError

_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has one of them


class SaveOnSignal(Callback):
    """Saves a checkpoint at the end of the optimizer step in which SIGTERM or SIGUSR1 arrived, on any rank, and ends the run.

    Lightning's own handler would save within a step. Where SLURM requeues, that handler runs, too, at the step's end.
    A signal from before the first step, while a validation runs or blocks are scored, waits for the end of that step.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run's signals."""
        self._received, self._before = 0, {}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over, until the Trainer puts back what was there before the run."""
        self._take_over()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over where there was no validation before."""
        self._take_over()
        self._step = trainer.global_step

    def _take_over(self) -> None:
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

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
        if not (number := self._received_anywhere(trainer)):
            return
        if number != signal.SIGTERM and callable(requeue := self._before.get(signal.Signals(number))):
            requeue(number, None)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or run_folder(trainer) / "checkpoints"
        path = Path(folder, f"interrupted-step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path, weights_only=False)
        remove_interrupted(trainer, path)
        name = signal.Signals(number).name
        raise RunError(f"stopped by {name} after step {trainer.global_step}; resume with --ckpt_path {path}")

    def _received_anywhere(self, trainer: Trainer) -> int:
        """The signal that arrived on any rank, the same one on all, or 0."""
        if trainer.world_size == 1:
            return self._received
        number = torch.tensor(self._received, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)  # strategy.reduce would hold all ranks up with a barrier
        return int(number)
