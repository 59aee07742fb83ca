"""What a model comes to on held-out data: loss, perplexity and exact match."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection


class HeldOutFigures(MetricCollection):
    """Mean loss over target tokens, its exponential, and the share of generated answers that equal their reference."""

    def __init__(self) -> None:
        super().__init__({"loss": MeanMetric(), "exact_match": MeanMetric()})

    def begin(self) -> None:
        """Begins anew, in float32 whatever dtype the Trainer's precision gave the metrics with the rest of the module."""
        with torch.inference_mode(False):  # a state made in inference mode could not be updated by a later fit
            self.reset()
        for metric in self.values():
            metric.set_dtype(torch.float32)

    def add_loss(self, loss: Tensor, targets: Tensor) -> None:
        """Adds a batch's mean loss (nats) and its number of targets, two scalars."""
        self["loss"].update(loss, weight=targets)

    def add_answers(self, pairs: Iterable[tuple[str, str | None]]) -> None:
        """Adds generated answers, each with its reference; without one (None) it fills up a rank's share."""
        hits = [float(answer.strip() == right.strip()) for answer, right in pairs if right is not None]
        self["exact_match"].update(torch.tensor(hits, dtype=torch.float32, device=self["loss"].device))

    def figures(self, stage: str) -> dict[str, float]:
        """Returns what was added as figures by their names in logs; all ranks take part."""
        loss = self["loss"].compute()
        figures = {f"{stage}_loss": loss.item(), f"{stage}_perplexity": loss.exp().item()}
        if self["exact_match"].update_count > 0:
            figures[f"{stage}_exact_match"] = self["exact_match"].compute().item()
        return figures
