"""Logged figures of training: tokens a second, time, memory and learning rates."""

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ows_lightning.callbacks.step_callback import StepCallback
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW


class Throughput(StepCallback):
    """Logs what each optimizer step of CausalLMModule costs; a resumed run's figures go on from the checkpoint's.

    ``tokens_per_second`` counts the time from each batch's start to its end, so neither validation nor generation, scoring,
    saving or waiting for data; nor what a GPU still does after a step's one synchronisation. ``tokens``,
    ``target_tokens``, ``time_s`` and ``renewal_s`` are sums since the run began: ``time_s`` of all time, ``renewal_s`` of
    what subspaces took. ``peak_memory_mb`` is the most memory held so far, in MB: allocated on a GPU, resident of the process
    on a CPU (on macOS since its start).
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # sums of the runs that this one resumes
        self._tokens, self._targets, self._start = 0.0, 0.0, time.perf_counter()
        self._seconds, self._batch_start = 0.0, 0.0  # within batches of the step under way

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            Throughput.__init__(self)
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
            with contextlib.suppress(OSError):  # on Linux alone the peak need not be that of earlier runs of this process
                Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._seconds += time.perf_counter() - self._batch_start
        super().on_train_batch_end(trainer, pl_module, *batch)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CausalLMModule) or pl_module.last_step_metrics is None:
            return
        self._tokens += pl_module.last_step_metrics.tokens
        self._targets += pl_module.last_step_metrics.num_targets
        # Tensors on the host: for a number, Lightning would wait for the device and put it there.
        pl_module.log("tokens_per_second", torch.tensor(pl_module.last_step_metrics.tokens / self._seconds), prog_bar=True)
        self._seconds = 0.0
        metrics = {**self._sums(trainer), "peak_memory_mb": _peak_memory_mb(pl_module.device)}
        pl_module.log_dict({name: torch.tensor(metric, dtype=torch.float64) for name, metric in metrics.items()})

    def _sums(self, trainer: Trainer) -> dict[str, float]:
        here = {"tokens": self._tokens, "target_tokens": self._targets, "time_s": time.perf_counter() - self._start}
        if renewals := [optimizer.renewal_s for optimizer in trainer.optimizers if isinstance(optimizer, GaLoreAdamW)]:
            here["renewal_s"] = sum(renewals)
        return {name: value + self._before.get(name, 0.0) for name, value in here.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the sums at a validation of a fit, too: a step that it follows need not be one that is logged."""
        if isinstance(pl_module, CausalLMModule) and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            sums, step = self._sums(trainer), trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(sums, step=step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = self._sums(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get("progress", {})


class LearningRates(Callback):
    """Logs the learning rate of each group, named as by Lightning's LearningRateMonitor, which waits for the device."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Logs the rates of the step that comes, in float64: a CSV file has them as they are written."""
        name, groups = f"lr-{type(optimizer).__name__}", optimizer.param_groups
        for number, group in enumerate(groups, start=1):
            pl_module.log(name if len(groups) == 1 else f"{name}/pg{number}", torch.tensor(group["lr"], dtype=torch.float64))


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
