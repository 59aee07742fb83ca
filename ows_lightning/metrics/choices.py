"""Multiple choice by likelihood: the choice that the model finds likeliest counts as its answer."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_STATES = ("row", "right", "characters", "log_likelihood")


class ChoiceAccuracy(Metric):
    """Share of the rows whose likeliest choice is the right one, raw and normalised by the choice's length.

    As in lm-evaluation-harness, lengths are characters, and the standard error is that of a mean of n samples.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, batch: dict[str, Tensor], log_likelihood: Tensor) -> None:
        """Adds a batch of choices, see `collate_choices`, with their log-likelihoods (B,)."""
        for name in _STATES:
            getattr(self, name).append(log_likelihood if name == "log_likelihood" else batch[name])

    def compute(self) -> dict[str, Tensor]:
        """Returns ``accuracy``, ``accuracy_norm``, and the standard error of each as ``..._stderr``."""
        # On the CPU: Apple's GPUs have no float64, and others would be waited for at every row.
        row, right, characters, log_likelihood = (dim_zero_cat(getattr(self, name)).cpu() for name in _STATES)
        metrics = {}
        for name, score in (("accuracy", log_likelihood), ("accuracy_norm", log_likelihood / characters)):
            hits = torch.stack([right[row == r][score[row == r].argmax()] for r in row.unique()]).double()
            metrics[name] = hits.mean()
            metrics[f"{name}_stderr"] = hits.std() / len(hits) ** 0.5 if len(hits) > 1 else torch.tensor(float("nan"))
        return metrics
