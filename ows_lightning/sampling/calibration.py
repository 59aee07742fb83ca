"""Which training rows the blocks' scores are measured on."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from ows_lightning.errors import UsageError, command_line


def calibration_batches(loader: Any, samples: int, seed: int) -> Iterable[dict[str, Tensor]]:
    """Returns batches of ``samples`` training rows, or all there are, the same on every rank and in every run with that seed.

    Of a stream they are whole batches, until there are as many rows. Of the train DataLoader the data set and the collate
    function are used, not its position.
    """
    hint = f"sampling.scores: give a file from `{command_line('score')}`"
    if not hasattr(loader, "dataset") or not hasattr(loader, "collate_fn"):  # Fabric's is no DataLoader, but has all of one
        raise UsageError(f"{hint}; calibration needs one DataLoader")
    dataset: Any = loader.dataset
    kind: Any = DataLoader
    if isinstance(dataset, IterableDataset):
        try:  # reading a copy leaves the run's position alone
            dataset = copy.deepcopy(dataset)
        except TypeError as error:  # it holds an open file, say
            raise UsageError(f"{hint}; the stream can't be copied for calibration ({error})") from error
        own = getattr(loader, "base_dataloader", loader)  # only its own class unpacks a stream's rows; not accelerate's
        kind = type(own) if isinstance(own, DataLoader) else DataLoader
        if hasattr(dataset, "num_replicas"):  # it is a rank's share
            dataset.rank, dataset.num_replicas = 0, 1
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed), device="cpu")
        dataset = Subset(dataset, order[:samples].tolist())
    size = None  # where the data set gives whole batches
    if loader.batch_sampler is not None:  # and if that was given, the loader has no batch size
        size = min(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1, samples)
    # Without a generator the DataLoader would draw from the global one, and change the order of the run's rows.
    batches = kind(dataset, batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator())
    return itertools.islice(batches, -(-samples // size)) if size else _first_rows(batches, samples)


def _first_rows(batches: Iterable[dict[str, Tensor]], samples: int) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield batch  # whoever takes it checks what it is
        samples -= len(batch["input_ids"])
        if samples <= 0:
            return
