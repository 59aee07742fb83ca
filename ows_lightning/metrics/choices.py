"""Multiple choice by likelihood: the choice that the model finds likeliest counts as its answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ChoiceAccuracy(Metric):
    """Share of the rows whose likeliest choice is the right one, raw and normalised by the choice's length.

    As in lm-evaluation-harness, lengths are characters, and the standard error is that of a mean of n samples.
    """

    full_state_update = False
    row: list[Tensor]
    right: list[Tensor]
    characters: list[Tensor]
    likelihood: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("row", "right", "characters", "likelihood"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, batch: dict[str, Tensor], likelihood: Tensor) -> None:
        """Adds a batch of choices, see `collate_choices`, with their log-likelihoods (B,)."""
        self.row.append(batch["row"])
        self.right.append(batch["right"])
        self.characters.append(batch["characters"])
        self.likelihood.append(likelihood)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``accuracy``, ``accuracy_norm``, and the standard error of each as ``..._stderr``."""
        row, right = dim_zero_cat(self.row), dim_zero_cat(self.right)
        likelihood, characters = dim_zero_cat(self.likelihood), dim_zero_cat(self.characters)
        metrics = {}
        for name, score in (("accuracy", likelihood), ("accuracy_norm", likelihood / characters)):
            hits = torch.stack([right[row == r][score[row == r].argmax()] for r in row.unique()]).double()
            metrics[name] = hits.mean()
            metrics[f"{name}_stderr"] = hits.std() / len(hits) ** 0.5 if len(hits) > 1 else torch.tensor(float("nan"))
        return metrics
