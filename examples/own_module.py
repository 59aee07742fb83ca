"""OWS in a LightningModule of your own, which uses nothing of this package but the callback.

Run it with ``python examples/own_module.py --model my-model``.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from ows_lightning import LayerwiseSampling


class MyModule(LightningModule):
    """Any module that holds a causal LM works, with any optimizer over all of its weights."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the model's own loss."""
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns an optimizer over all weights: later the callback freezes blocks and frees their state."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main() -> None:
    """Trains a few steps on random tokens, and says which blocks trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threshold", type=float, default=13.0)
    args = parser.parse_args()
    ids = torch.randint(3, 100, (32, 16))
    rows = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    sampling = LayerwiseSampling(activated_layers=2, interval_steps=2, threshold=args.threshold, always_train=["norm"])
    trainer = Trainer(max_steps=6, devices=1, callbacks=[sampling], logger=False, enable_checkpointing=False)
    trainer.fit(MyModule(args.model), rows)
    for interval, step, blocks in sampling.history:
        print(f"interval {interval}, from step {step}: blocks {blocks}")


if __name__ == "__main__":
    main()
