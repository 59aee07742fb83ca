"""Saving a checkpoint on SIGTERM and SIGUSR1, which clusters send before they stop a job."""

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from ows_lightning.callbacks.run_checkpoint import checkpoint_callback, remove_interrupted
from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.callbacks.step_callback import StepCallback
from ows_lightning.errors import RunError
from ows_lightning.module import CausalLMModule

_SIGNALS = [signal.SIGTERM, signal.SIGUSR1]
_CODE_BASE = 1024  # more than there are ranks: their sum tells how many have received which signal


class SaveOnSignal(StepCallback):
    """Saves a checkpoint at the end of the optimizer step in which SIGTERM or SIGUSR1 arrived, on any rank, and ends the run.

    Lightning's own handler would save within a step. Where SLURM requeues, that handler runs, too, at the step's end.
    A signal from before the first step, while a validation runs or blocks are scored, waits for the end of that step; on
    several ranks one that arrives in a step's last micro-batch waits for the end of the next step.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SaveOnSignal.__init__(self)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs its handlers, where a validation comes first."""
        self._install_handlers()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs its handlers, where none came first."""
        super().on_train_start(trainer, pl_module)
        self._install_handlers()

    def _install_handlers(self) -> None:  # the Trainer restores those from before the run
        if not self._previous_handlers and threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(pl_module, CausalLMModule):
            number = self._received
            pl_module.step_accumulator.signal_code = _CODE_BASE ** _SIGNALS.index(signal.Signals(number)) if number else 0

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (number := self._received_on_any_rank(trainer, pl_module)):
            return
        if number != signal.SIGTERM and callable(requeue := self._previous_handlers.get(signal.Signals(number))):
            requeue(number, None)
        folder = getattr(checkpoint_callback(trainer), "dirpath", None) or run_folder(trainer) / "checkpoints"
        path = f"{folder}/interrupted-step={trainer.global_step}.ckpt"  # Path would make a local folder of an address
        trainer.save_checkpoint(path, weights_only=False)
        remove_interrupted(trainer, Path(path))
        name = signal.Signals(number).name
        raise RunError(f"stopped by {name} after step {trainer.global_step}; resume with --ckpt_path {shlex.quote(path)}")

    def _received_on_any_rank(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The signal that arrived on any rank, or 0; the same on all ranks."""
        if trainer.world_size == 1:
            return self._received
        if isinstance(pl_module, CausalLMModule) and pl_module.last_step_metrics is not None:
            codes = pl_module.last_step_metrics.signal_codes  # which came with the step's loss, in one wait
            return next((n for i, n in enumerate(_SIGNALS) if codes // _CODE_BASE**i % _CODE_BASE), 0)
        number = torch.tensor(self._received, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)  # strategy.reduce would hold all ranks up with a barrier
        return int(number)
