"""Which rows are for training, validation and testing, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from ows_lightning.data.encoding import Encoder
from ows_lightning.data.examples import column, example_features, read_examples, stream_examples, tokenise, warn_of_dropped
from ows_lightning.data.formats import NEEDED_COLUMNS
from ows_lightning.data.multiple_choice import choices_of
from ows_lightning.data.packing import pack
from ows_lightning.data.rows import Rows
from ows_lightning.data.sources import DataSource, join_names, resolve
from ows_lightning.data.stream import BUFFER_SIZE
from ows_lightning.errors import UsageError

if TYPE_CHECKING:
    import datasets

_MAX_REPEATS = 1000  # of the rows of a source of a mixture in an epoch


@dataclass
class Splits:
    """The parts ``train``, ``val`` and ``test`` of the data, each made of rows that one of the settings names.

    The settings are those of `InstructionDataModule` that decide which examples there are; a *key* below is the name of one
    of the first three. Sources are read at first use, and kept.
    """

    dataset: str | list[str] | dict[str, float]
    eval_dataset: str | list[str] | None
    test_dataset: str | list[str] | None
    val_size: int | float
    streaming: bool
    data_format: str | None
    columns: Mapping[str, str]
    split: str
    seed: int
    _tables: dict[str, list[datasets.Dataset]] = field(default_factory=dict, init=False)  # one for each source
    _examples: dict[str, datasets.Dataset] = field(default_factory=dict, init=False)
    tokens: dict[str, datasets.Dataset] = field(default_factory=dict, init=False)

    def check(self, parts: Collection[str], choices: bool) -> None:
        """Reads and checks the sources of these parts, to train all; with `choices` also the test rows' choices."""
        keys = {"dataset", "eval_dataset", "test_dataset"} if "train" in parts else {self.key_of(part) for part in parts}
        for key in sorted(key for key in keys if key and getattr(self, key)):
            self.all_examples(key)
        if self.columns:
            self._check_columns("train" in parts)
        if "dataset" in keys:
            self._train_and_validation()
        if choices and self.key_of("test"):
            for entry in self.examples("test"):
                choices_of(json.loads(entry["example"]), entry["where"])

    def _check_columns(self, trains: bool) -> None:
        """Refuses a name in `columns` that no row has (of a stream no first row); in evaluation warns of an optional one."""
        there = {name for table in self._examples.values() for names in table["renamed"] for name in names}
        if self.streaming and trains:
            there |= {name for entry in self._stream().take(BUFFER_SIZE) for name in entry["renamed"]}
        for name in [name for name, own in self.columns.items() if own not in there]:
            fault = f"data.columns.{name}: no row has a column '{self.columns[name]}'; correct the name, or leave it out"
            if trains:
                raise UsageError(fault)
            if name not in NEEDED_COLUMNS:
                rank_zero_warn(fault)

    def key_of(self, part: str) -> str | None:
        """The setting that a part's rows come from; None where there are none, or a stream of them."""
        if part == "train":
            return None if self.streaming else "dataset"
        if part == "test" and self.test_dataset:
            return "test_dataset"
        return "eval_dataset" if self.eval_dataset else "dataset" if self.val_size else None

    def examples(self, part: str) -> datasets.Dataset:
        """The examples of a part."""
        return self.all_examples(str(self.key_of(part))).select(self._indices(part))

    def rows(self, part: str, encoder: Encoder, packing: bool = False) -> Rows:
        """The tokenised rows of a part that have a target, at least one; with `packing` several documents to a row."""
        key = str(self.key_of(part))
        documents = self.all_tokens(key, encoder)
        row_of, wanted = column(documents, "row"), self._indices(part)
        first, last = np.searchsorted(row_of, wanted, "left"), np.searchsorted(row_of, wanted, "right")
        has_target = column(documents, "length") > 0
        chosen = [i for a, b in zip(first.tolist(), last.tolist(), strict=True) for i in range(a, b) if has_target[i]]
        if not has_target.any():
            where = self.all_examples(key)["where"]
            unshown = ", ".join(dict.fromkeys(what for parts in documents["unshown"] for what in parts))
            fault = f"none of {len(where)} rows has a target token (an answer that is not empty, nor special tokens alone)"
            hint = "; `predict` needs none" if part == "test" else ""
            hint += f"; the chat template does not show {unshown}" if unshown else ""
            raise UsageError(f"data.{key}: {fault}: {join_names(where)}{hint}")
        if not chosen:
            raise UsageError(f"data.{key}: no row for {part} has an answer to train on")
        if not packing:
            return Rows(documents, [[document] for document in chosen])
        packed = pack(column(documents, "length")[chosen].tolist(), encoder.max_seq_length)
        return Rows(documents, [[chosen[i] for i in row] for row in packed], packed=True)

    def all_examples(self, key: str) -> datasets.Dataset:
        """All examples of a setting; of a stream those for validation."""
        from datasets import concatenate_datasets

        if key not in self._examples:
            is_stream = key == "dataset" and self.streaming
            self._examples[key] = self._head_of_stream() if is_stream else concatenate_datasets(self._read_tables(key))
        return self._examples[key]

    def all_tokens(self, key: str, encoder: Encoder) -> datasets.Dataset:
        """The documents of all examples of a setting, see `token_features`; logs what was left out or cut."""
        if key not in self.tokens:
            examples = self.all_examples(key)
            tokens = self.tokens[key] = tokenise(examples, encoder, key)
            dropped = len(self.indices_without_target(key))
            documents, rows = len(tokens) - dropped, len(examples) - dropped
            if documents:
                warn_of_dropped(key, tokens, examples["where"], f"{len(examples)} rows")
            if documents > rows:
                why = "since the template rewrites earlier answers: each is trained at the end of a row of its own."
                rank_zero_info(f"data.{key}: {rows} rows became {documents}, {why}")
            if truncated := int(column(tokens, "truncated").sum()):
                limit = encoder.max_seq_length
                rank_zero_info(f"data.{key}: {truncated} of {documents} rows were cut to max_seq_length={limit} tokens.")
        return self.tokens[key]

    def indices_without_target(self, key: str) -> list[int]:
        """The examples of a tokenised setting that gave no document, having no target."""
        return column(self.tokens[key], "row")[column(self.tokens[key], "length") == 0].tolist()

    def training_stream(self) -> datasets.IterableDataset:
        """The training examples of a stream, over and over, without those for validation."""
        return self._stream().skip(len(self.all_examples("dataset"))).repeat(None)

    def _indices(self, part: str) -> np.ndarray:
        """The examples of a part, by their index in what its setting names."""
        key = self.key_of(part)
        if key != "dataset":
            return np.arange(len(self.all_examples(str(key))))
        train, val = self._train_and_validation()
        return self._apply_mixture(train) if part == "train" else val

    def _train_and_validation(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples of `dataset` to train on, and those for validation."""
        total = len(self.all_examples("dataset"))
        if self.streaming:
            return np.arange(0), np.arange(total)
        if self.eval_dataset or not self.val_size:
            return np.arange(total), np.arange(0)
        size = self.val_size if isinstance(self.val_size, int) else max(1, round(total * self.val_size))
        if size >= total:
            hint = f"set val_size: 0, or less than {total}"
            raise UsageError(f"data.val_size: {self.val_size} of {total} rows leaves none to train on; {hint}")
        order = np.random.default_rng(self.seed).permutation(total)
        return np.sort(order[size:]), np.sort(order[:size])

    def _apply_mixture(self, rows: np.ndarray) -> np.ndarray:
        if not isinstance(self.dataset, Mapping):
            return rows
        ends = np.cumsum([len(table) for table in self._read_tables("dataset")])
        parts = dict(zip(self.dataset, np.split(rows, np.searchsorted(rows, ends[:-1])), strict=True))
        if empty := [name for name, part in parts.items() if not len(part)]:
            raise UsageError(f"data.dataset: '{empty[0]}' has no row left to train on; lower val_size or give an eval_dataset")
        mixed = _mix(parts, self.dataset, self.seed)
        for (name, part), repeated in zip(parts.items(), mixed, strict=True):
            times = f"{len(repeated) / len(part):.2f} times"
            rank_zero_info(f"data.dataset: {name} gives {len(repeated)} rows an epoch, each {times}.")
        return np.concatenate(mixed)

    def _read_tables(self, key: str) -> list[datasets.Dataset]:
        if key not in self._tables:
            self._tables[key] = [read_examples(source, self.data_format, self.columns) for source in self._sources(key)]
        return self._tables[key]

    def _sources(self, key: str) -> list[DataSource]:
        named = getattr(self, key)
        return [resolve(str(name), key, self.split) for name in ([named] if isinstance(named, (str, Path)) else named)]

    def _head_of_stream(self) -> datasets.Dataset:
        from datasets import Dataset

        val_rows = 0 if self.eval_dataset else int(self.val_size)
        first = list(self._stream().take(val_rows + 1))  # one more, to see whether there are others
        if len(first) <= val_rows:
            hint = "lower it, or set val_size: 0"
            raise UsageError(f"data.val_size: {val_rows} of {len(first)} rows leaves none to train on; {hint}")
        features = example_features()
        return Dataset.from_dict({name: [row[name] for row in first[:val_rows]] for name in features}, features=features)

    def _stream(self) -> datasets.IterableDataset:
        from datasets import concatenate_datasets, interleave_datasets

        streams = [stream_examples(source, self.data_format, self.columns) for source in self._sources("dataset")]
        if not isinstance(self.dataset, Mapping) or len(streams) == 1:
            return concatenate_datasets(streams)
        weights = np.asarray(list(self.dataset.values()), dtype=float)
        shares = (weights / weights.sum()).tolist()
        # Each source repeats on its own: repeating the mixture would start all of them anew.
        return interleave_datasets([stream.repeat(None) for stream in streams], shares, seed=self.seed)


def _mix(parts: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int) -> list[np.ndarray]:
    """Repeats each source's rows up to its share, a remainder drawn by the seed; the largest for its weight is taken once."""
    once = max(parts, key=lambda name: len(parts[name]) / weights[name])
    per_weight = len(parts[once]) / weights[once]
    most = max(parts, key=lambda name: per_weight * weights[name] / len(parts[name]))
    if (repeats := per_weight * weights[most] / len(parts[most])) > _MAX_REPEATS:
        what = f"by these weights an epoch has each row of '{most}' {repeats:.3g} times, since no row of '{once}' is left out"
        hint = f"at most {_MAX_REPEATS} are possible: raise the weight of '{once}', or take fewer of its rows"
        raise UsageError(f"data.dataset: {what}; {hint}")
    random, mixed = np.random.default_rng(seed), []
    for name, part in parts.items():
        whole, rest = divmod(round(per_weight * weights[name]), len(part))
        mixed.append(np.concatenate([np.tile(part, whole), random.permutation(part)[:rest]]))
    return mixed
