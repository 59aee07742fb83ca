"""A callback that tests put into a run, to see on each rank what users can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

COUNTED = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast")


class Probe(Callback):
    """Writes each step's loss and, by kind, how many elements were communicated in it, for every rank.

    Args:
        folder: Where to write ``rank0.json`` and so on.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []
        self.communicated: list[dict[str, int]] = []
        self._now: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in COUNTED:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            sent = kwargs.get("tensor", kwargs.get("input", args[0] if args else None))
            if name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
                sent = kwargs.get("input", kwargs.get("input_tensor", args[1] if len(args) > 1 else None))
            if isinstance(sent, Tensor):
                self._now[name] = self._now.get(name, 0) + sent.numel()
            return call(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._now = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
            self.communicated.append(dict(self._now))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"losses": self.losses, "communicated": self.communicated}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(content))
        torch.save(trainer.optimizers[0].state_dict()["param_groups"], self.folder / f"groups{trainer.global_rank}.pt")
