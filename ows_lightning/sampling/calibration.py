"""Calibration text for the blocks' scores: rows of the training data, read without moving the run's own position."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from ows_lightning.errors import UsageError, command_line


def calibration_batches(loader: Any, samples: int, seed: int) -> Iterable[dict[str, Tensor]]:
    """Returns batches of so many training rows, if there are, the same on every rank and in every run with that seed.

    Of the train DataLoader the data set and the collate function are used, not its position.
    """
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"sampling.scores: give a file from `{command_line('score')}`; calibration needs a single train DataLoader"
        )
    dataset = loader.dataset
    kind: Any = DataLoader
    if isinstance(dataset, IterableDataset):
        # Reading a copy leaves the run's position alone. Only the same class of loader can unpack the stream's rows.
        dataset, kind = copy.deepcopy(dataset), type(loader)
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        dataset = Subset(dataset, order[:samples].tolist())
    # A loader that was given a batch sampler has no batch size.
    size = min(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1, samples)
    # Without a generator the DataLoader would draw from the global one, and change the order of the run's rows.
    batches = kind(dataset, batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator())
    return itertools.islice(batches, -(-samples // size))
