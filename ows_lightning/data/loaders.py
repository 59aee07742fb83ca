"""From tokenised rows to batches: rows by index, their order over ranks and epochs, and collation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ows_lightning.data.formats import split_prompt
from ows_lightning.data.masking import IGNORED, Encoder

Item = dict[str, list[int]]


class Rows(Dataset[Item]):
    """Rows of token ids and labels, each made of one document, or of several when packed.

    The row behind the last, at index ``len(rows)``, has no target: it fills up the ranks' shares (see `ShardedSampler`).

    Args:
        documents: A `datasets.Dataset` with the columns ``input_ids`` and ``labels``.
        rows: For every row the indices of its documents.
        packed: Add ``position_ids`` that restart with every document.
    """

    def __init__(self, documents: Any, rows: Sequence[Sequence[int]], packed: bool = False) -> None:
        self.documents = documents
        self.rows = rows
        self.packed = packed
        self.lengths = [int(sum(n)) for n in _take(documents.with_format("numpy")["length"][:], rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        documents = self.documents[list(self.rows[min(index, len(self) - 1)])]
        item = as_item(list(zip(documents["input_ids"], documents["labels"], strict=True)), self.packed)
        if index == len(self):
            item["labels"] = [IGNORED] * len(item["labels"])
        return item


def as_item(documents: Sequence[tuple[list[int], list[int]]], packed: bool) -> Item:
    """Join the token ids and labels of documents to a row; when packed, ``position_ids`` restart with every document."""
    item = {"input_ids": [x for ids, _ in documents for x in ids], "labels": [x for _, labels in documents for x in labels]}
    if packed:
        item["position_ids"] = [position for ids, _ in documents for position in range(len(ids))]
    return item


class PromptRows(Dataset[dict[str, Any]]):
    """Rows as prompts: ``input_ids``, the rendered ``prompt``, the ``reference`` answer, ``answer``, ``choices``, ``row``.

    The row behind the last has no reference (None): it fills up the ranks' shares (see `ShardedSampler`).

    Args:
        table: The examples, with the columns ``where`` and ``example``.
        encoder: Renders and tokenises.
    """

    def __init__(self, table: Any, encoder: Encoder) -> None:
        self.table = table
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.table[min(index, len(self) - 1)]
        example = json.loads(entry["example"])
        prompt, input_ids = self.encoder.encode_prompt(example, entry["where"])
        return {
            "input_ids": input_ids,
            "prompt": prompt,
            "reference": split_prompt(example.get("messages", []))[1] if index < len(self) else None,
            "answer": example.get("answer"),
            "choices": example.get("choices"),
            "row": index,
        }


def _take(values: np.ndarray, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    return (values[list(row)] for row in rows)


class ShardedSampler(DistributedSampler):
    """The order of rows, drawn from (seed, epoch), of which every rank takes its part.

    Rank r of w takes the rows r, r + w, ... of the order, so w ranks with batches of b rows see together the same rows at
    the same step as one process with batches of w * b rows. When the rows don't divide evenly, ranks are filled up with the
    index behind the last, a row without targets: all ranks make the same number of steps and no row counts twice.

    It is a `DistributedSampler`, which Lightning leaves in place and tells the epoch.

    Args:
        lengths: Length of every row in tokens; only their number counts without `group_size`.
        rank: This process's rank.
        num_replicas: Number of processes.
        seed: Seed of the order.
        shuffle: Draw the order, or keep it as it is.
        group_size: When set, rows are sorted by length within every 50 groups of this many rows, and the groups are shuffled:
            the rows of a batch have then similar lengths.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_size: int | None = None,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = np.asarray(lengths)
        self.group_size = group_size
        self.skip = 0  # rows of this rank that the next iteration leaves out

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self.lengths))
        if self.shuffle:
            random = np.random.default_rng([self.seed, self.epoch])
            order = random.permutation(order)
            if self.group_size:
                order = self._grouped(order, self.group_size, random)
        filled = np.append(order, np.full(self.total_size - len(order), len(order)))
        skip, self.skip = self.skip, 0
        return iter(filled[self.rank :: self.num_replicas][skip:].tolist())

    def _grouped(self, order: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
        starts = range(0, len(order), 50 * size)
        order = np.concatenate(
            [o[np.argsort(-self.lengths[o], kind="stable")] for o in (order[s : s + 50 * size] for s in starts)]
        )
        whole, rest = np.split(order, [len(order) // size * size])
        return np.append(random.permutation(whole.reshape(-1, size)).ravel(), rest)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a `ShardedSampler` that knows its position, which Lightning keeps in its checkpoints.

    The position is the epoch and how many rows all ranks have seen of it, so a run may be resumed with another batch size or
    number of ranks. At the end of an epoch it is the start of the next. (torchdata's StatefulDataLoader is exhausted there; a
    run that Lightning 2.6 resumes from the last step of an epoch would leave out the next epoch.)

    Attributes:
        trainer: Tells the epoch. (What Lightning tells the sampler is one ahead after some resumes with `max_steps`.)
    """

    trainer: Trainer | None = None
    _position = _resume_at = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not isinstance(self.sampler, ShardedSampler):  # overfit_batches puts in another
            yield from super().__iter__()
            return
        # A generator, so that this runs at the first `next`, in the epoch that is meant. A position in another one is void.
        epoch = self.trainer.current_epoch if self.trainer else 0
        rows = self._resume_at[1] if self._resume_at[0] == epoch else 0
        self._resume_at = (0, 0)
        self.sampler.set_epoch(epoch)
        self.sampler.skip = rows
        for batch in super().__iter__():
            rows += self.batch_size or 0
            self._position = (epoch, rows) if rows < len(self.sampler) else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: ``epoch``, and ``rows`` of it seen by all ranks."""
        return {"epoch": self._position[0], "rows": self._position[1] * getattr(self.sampler, "num_replicas", 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration at this position."""
        self._position = self._resume_at = (state["epoch"], state["rows"] // getattr(self.sampler, "num_replicas", 1))


def collate(items: Sequence[Item], pad_token_id: int, flatten: bool = False) -> dict[str, Tensor]:
    """Pad rows on the right to the longest.

    Args:
        items: Rows.
        pad_token_id: Token that pads.
        flatten: Put packed rows behind one another into a single one, the form in which flash attention finds documents.

    Returns:
        ``input_ids`` and ``labels``, and either ``attention_mask`` or, for packed rows, ``position_ids``; int64 (B, L). The
        padding of a packed row is a document of its own.
    """
    packed = "position_ids" in items[0]
    if packed and flatten:
        return {name: torch.tensor([[x for item in items for x in item[name]]]) for name in items[0]}
    length = max(len(item["input_ids"]) for item in items)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids" if packed else "attention_mask": []}
    for item in items:
        size = len(item["input_ids"])
        padding = length - size
        batch["input_ids"].append(item["input_ids"] + [pad_token_id] * padding)
        batch["labels"].append(item["labels"] + [IGNORED] * padding)
        if packed:
            batch["position_ids"].append(item["position_ids"] + list(range(padding)))
        else:
            batch["attention_mask"].append([1] * size + [0] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def collate_prompts(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Pad prompts on the left, where generation goes on from their last token.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 (B, L); ``row``, int64 (B,); every other column as a list.
    """
    length = max(len(item["input_ids"]) for item in items)
    padding = [length - len(item["input_ids"]) for item in items]
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    ids = zip(batch["input_ids"], padding, strict=True)
    batch["input_ids"] = torch.tensor([[pad_token_id] * n + row for row, n in ids])
    batch["attention_mask"] = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
    batch["row"] = torch.tensor(batch["row"])
    return batch
