"""Training rows from a stream that is never held as a whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import IterableDataset

from ows_lightning.data.loader import Item, as_item
from ows_lightning.data.masking import Encoder
from ows_lightning.data.packing import pack
from ows_lightning.errors import UsageError

BLOCK = 1000  # examples that are read, packed and shuffled together


class StreamRows(IterableDataset[Item]):
    """Endless rows from a stream of examples, tokenised, packed and shuffled a block at a time.

    Rank r of w takes the rows r, r + w, ... of the stream, as with `ShardedSampler`. The state is that of the stream at the
    start of the block and the number of rows seen, the same on all ranks. It gives exactly the remaining rows: a block is
    drawn anew from the seed, whereas the contents of the shuffle buffer of `datasets` would be lost.

    Args:
        examples: Endless stream with the columns ``where`` and ``example``.
        encoder: Turns examples into rows.
        length: What `len` says, the rows of this rank that a run takes.
        packing: Pack the documents of a block.
        rank: This process's rank.
        num_replicas: Number of processes.
        seed: Seed of the order.
    """

    def __init__(
        self,
        examples: datasets.IterableDataset,
        encoder: Encoder,
        length: int,
        packing: bool = False,
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
    ) -> None:
        self.examples = examples
        self.encoder = encoder
        self.length = length
        self.packing = packing
        self.rank = rank
        self.num_replicas = num_replicas
        self.seed = seed
        self._state: dict[str, Any] = {"examples": examples.state_dict(), "block": 0, "first_row": 0, "next_row": 0}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Item]:
        state = self._state
        self.examples.load_state_dict(state["examples"])
        stream = iter(self.examples)
        while True:
            rows = self._rows(list(itertools.islice(stream, BLOCK)), state["block"])
            for index, row in enumerate(rows, start=state["first_row"]):
                if index >= state["next_row"] and index % self.num_replicas == self.rank:
                    self._state = {**state, "next_row": index - self.rank + self.num_replicas}
                    yield row
            state = {
                "examples": self.examples.state_dict(),
                "block": state["block"] + 1,
                "first_row": state["first_row"] + len(rows),
                "next_row": self._state["next_row"],
            }

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration at this position."""
        self._state = state

    def _rows(self, block: Sequence[dict[str, str]], number: int) -> list[Item]:
        documents: list[tuple[list[int], list[int]]] = []
        dropped: dict[str, None] = {}  # in order, and once each
        for entry in block:
            encoded = self.encoder.encode(json.loads(entry["example"]), entry["where"])
            documents += [(row.input_ids, row.labels) for row in encoded]
            dropped |= {} if encoded else {entry["where"]: None}
        if dropped and number == 0:
            named = ", ".join(list(dropped)[:10]) + (", ..." if len(dropped) > 10 else "")
            if not documents:
                raise UsageError(f"data.dataset: none of the first {len(dropped)} rows has an answer to train on: {named}")
            rank_zero_warn(f"data.dataset: of the first {BLOCK} rows those without an answer are left out: {named}")
        rows = [[i] for i in range(len(documents))]
        if self.packing:
            rows = pack([len(ids) for ids, _ in documents], self.encoder.max_seq_length)
        order = np.random.default_rng([self.seed, number]).permutation(len(rows))
        return [as_item([documents[i] for i in rows[k]], self.packing) for k in order]
