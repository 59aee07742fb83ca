"""Perplexity from summed losses."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.text import Perplexity


class TokenPerplexity(Perplexity):
    """torchmetrics' perplexity, fed with summed losses: logits of a whole batch never exist."""

    def update(self, loss: Tensor, targets: Tensor) -> None:
        """Adds a summed cross entropy (nats) over a number of targets."""
        self.total_log_probs += loss
        self.count += targets
