"""Training rows from a stream that is never held as a whole."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ows_lightning.data.encoding import Encoder
from ows_lightning.data.examples import encode, warn_of_dropped
from ows_lightning.data.packing import pack
from ows_lightning.data.rows import Item, join_documents
from ows_lightning.data.sources import join_names
from ows_lightning.errors import UsageError

State = dict[str, Any]
BUFFER_SIZE = 1000  # examples that are read, packed and shuffled together


@dataclass(eq=False)
class StreamRows(IterableDataset[tuple[Item, State]]):
    """Endless rows from a stream of examples, tokenised, packed and shuffled a block at a time.

    Every row comes with the position after it: the state of the stream at the start of the block and the number of rows
    seen, the same on all ranks. An iteration that begins there, at ``state``, gives exactly the remaining rows. Rank r of w
    takes the rows r, r + w, ... of these, as with `RankSampler`. ``len`` is what a run takes of this rank's rows.
    """

    examples: Any  # a `datasets.IterableDataset`
    encoder: Encoder
    length: int
    packing: bool
    rank: int
    num_replicas: int
    seed: int
    sources: list[str]  # their names, without folders

    def __post_init__(self) -> None:
        order = {"sources": self.sources, "seed": self.seed, "packing": self.packing, "length": self.encoder.max_seq_length}
        position = {"examples": self.examples.state_dict(), "block": 0, "first_row": 0, "next_row": 0}
        self.state: State = {**position, "order": order}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Item, State]]:
        state = self.state
        self.examples.load_state_dict(state["examples"])
        stream = iter(self.examples)
        while True:
            rows = self._rows(list(itertools.islice(stream, BUFFER_SIZE)), state["block"])
            for index, row in enumerate(rows, start=state["first_row"]):
                if index >= state["next_row"] and (index - state["next_row"]) % self.num_replicas == self.rank:
                    yield row, {**state, "next_row": index - self.rank + self.num_replicas}
            state = {**state, "block": state["block"] + 1, "first_row": state["first_row"] + len(rows)}
            state["examples"] = self.examples.state_dict()

    def _rows(self, block: Sequence[dict[str, str]], number: int) -> list[Item]:
        batch = {name: [entry[name] for entry in block] for name in ("where", "example")}
        where, pairs = batch["where"], [*zip(*batch.values(), strict=True)]
        columns = encode(batch, [*map(pairs.index, pairs)], self.encoder, find_unshown=number == 0)  # streams may repeat rows
        documents = [(ids, labels) for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True) if ids]
        if number == 0:
            if not documents:
                named = join_names(dict.fromkeys(where))
                raise UsageError(f"data.dataset: none of the first {len({*pairs})} rows has an answer to train on: {named}")
            among, limit = f"the first {BUFFER_SIZE} rows", self.encoder.max_seq_length
            warn_of_dropped("dataset", columns, where, among)
            if (cut := sum(columns["truncated"])) and self.length > 1:  # not for a sample of one row
                rank_zero_info(f"data.dataset: {cut} of {among} were cut to max_seq_length={limit} tokens.")
        rows = [[i] for i in range(len(documents))]
        if self.packing:
            rows = pack([len(ids) for ids, _ in documents], self.encoder.max_seq_length)
        order = np.random.default_rng([self.seed, number]).permutation(len(rows))
        return [join_documents([documents[i] for i in rows[k]], self.packing) for k in order]


class StreamLoader(DataLoader[Any]):
    """A DataLoader over `StreamRows` whose position Lightning keeps in checkpoints, also with a worker that reads ahead."""

    dataset: StreamRows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for batch, state in super().__iter__():
            self.dataset.state = state
            yield batch

    def state_dict(self) -> State:
        """The position after the batches that were taken."""
        return self.dataset.state

    def load_state_dict(self, state: State) -> None:
        """Begins the next iteration at this position; a UsageError says that it is one in a stream of other sources."""
        now = self.dataset.state["order"]
        before = {**now, **state.get("order", {})}
        if before["sources"] != now["sources"]:
            what = f"the checkpoint is of a stream of {before['sources']}, and these are {now['sources']}"
            raise UsageError(f"data.dataset: {what}; set it back, or start anew")
        if changed := [f"{name} from {before[name]} to {value}" for name, value in now.items() if before[name] != value]:
            rank_zero_warn(f"The resumed stream gives other rows ({', '.join(changed)}): some may come twice, others never")
        self.dataset.state = {**state, "order": now}


def collate_with_state(
    rows: Sequence[tuple[Item, State]], collate: Callable[[list[Item]], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], State]:
    """Collates rows, and keeps the position after the last one."""
    return collate([item for item, _ in rows]), rows[-1][1]
