"""Short runs of a tiny model, for the complaints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ows_lightning.optim.galore import GaLoreAdamW
from tests.tiny import tiny_batch


def galore(params: Any) -> GaLoreAdamW:
    return GaLoreAdamW(params, lr=1e-2)


def rows(number: int = 8, uneven: bool = False) -> list[dict[str, torch.Tensor]]:
    """Rows of tokens; ``uneven`` ones have from one to `number` targets."""
    batch = tiny_batch(rows=number, length=12)
    for row in range(number if uneven else 0):
        batch["labels"][row, : 11 - row] = -100
    return [{key: value[row] for key, value in batch.items()} for row in range(number)]


def fit(
    module: Any, folder: Path, *callbacks: Callback, batch_size: int = 2, uneven: bool = False, **settings: Any
) -> Trainer:
    settings = {"max_steps": 4, "logger": False, "enable_checkpointing": False, **settings}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **settings)
    trainer.fit(module, DataLoader(rows(uneven=uneven), batch_size=batch_size))
    return trainer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16))


def projected(model: nn.Module, **settings: Any) -> GaLoreAdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    return GaLoreAdamW([{"params": matrices, "rank": 4, **settings}, {"params": others}], lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, parts: int = 1) -> None:
    """A step on 32 rows, in so many equal micro-batches."""
    x = torch.randn(32, 24, generator=torch.Generator().manual_seed(number))
    for i, part in enumerate(x.chunk(parts), start=1):
        if isinstance(optimizer, GaLoreAdamW):
            optimizer.accumulating = i < parts
        ((model(part) - part[:, :16] ** 2).square().mean() / parts).backward()
    optimizer.step()
    optimizer.zero_grad()
