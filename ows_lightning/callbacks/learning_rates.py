"""The learning rates of each optimizer step, logged."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRates(Callback):
    """Logs the learning rate of each group, named as by Lightning's LearningRateMonitor, which waits for the device."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Logs the rates of the step that comes, in float64: a CSV file has them as they are written."""
        name, groups = f"lr-{type(optimizer).__name__}", optimizer.param_groups
        for number, group in enumerate(groups, start=1):
            pl_module.log(name if len(groups) == 1 else f"{name}/pg{number}", torch.tensor(group["lr"], dtype=torch.float64))
