"""What it costs that frozen blocks computed in int8: the held-out loss with them, and with the exact weights alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightning.pytorch import Trainer

from ows_lightning.module import CausalLMModule


def losses(trainer: Trainer, module: CausalLMModule) -> tuple[float, float] | None:
    """Returns the held-out loss with frozen blocks in int8, and with the exact weights; None without int8 or held-out rows.

    Args:
        trainer: Of a run that has trained, and validated before.
        module: Its module.
    """
    if module.offloader is None or module.hparams["frozen_dtype"] is None or not trainer.val_dataloaders:
        return None
    training = module.training
    module.eval()
    try:
        rounded = _loss(trainer, module)
        with module.offloader.exact_weights():
            return rounded, _loss(trainer, module)
    finally:
        module.train(training)


@torch.inference_mode()
def _loss(trainer: Trainer, module: CausalLMModule) -> float:
    loaders: Any = trainer.val_dataloaders
    total = targets = 0.0
    for loader, limit in zip(loaders if isinstance(loaders, list) else [loaders], trainer.num_val_batches, strict=False):
        for batch in itertools.islice(loader, None if limit == float("inf") else int(limit)):
            if "labels" in batch:  # else prompts to be answered
                with trainer.precision_plugin.forward_context():
                    parts = module(**trainer.strategy.batch_to_device(batch))
                total, targets = total + float(parts.total), targets + float(parts.targets)
    return total / targets if targets else float("nan")
