"""The LightningDataModule for instruction data."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import datasets
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ows_lightning.data import formats, masking, sources
from ows_lightning.data.formats import FORMATS
from ows_lightning.data.loader import PromptRows, ResumableLoader, Rows, ShardedSampler, collate, collate_prompts
from ows_lightning.data.masking import IGNORED, Encoder, with_chat_template
from ows_lightning.data.packing import pack, require_position_ids
from ows_lightning.data.sources import Source
from ows_lightning.errors import UsageError

_TABLE = datasets.Features({"where": datasets.Value("string"), "example": datasets.Value("string")})
_TOKENS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "targets": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "row": datasets.Value("int64"),
    }
)
_ROWS_PER_PROCESS = 5000


class InstructionDataModule(LightningDataModule):
    """Instruction data from files or the hub, tokenised with the model's chat template, with loss on the answers alone.

    A source is a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a directory or glob of them, a directory written by
    `datasets.Dataset.save_to_disk`, or a data set on the hub (``owner/name[/config][:split]``). The format is recognised from
    the columns:

    ================== ============================================ ==========================================
    format             columns                                      becomes
    ================== ============================================ ==========================================
    messages           messages (role, content), tools?             the conversation as it is
    sharegpt           conversations (from, value), system?, tools? the conversation
    alpaca             instruction, input?, output, system?         one question and its answer
    prompt_completion  prompt, completion (text or messages)        one question and its answer
    text               text                                         plain text, every token a target
    ================== ============================================ ==========================================

    ``answer`` and ``choices`` are kept for scoring; where a test set has no output or completion, ``answer`` stands in for it.

    Training batches are dicts of int64 tensors (B, L), padded on the right to the longest row: ``input_ids``, ``labels``
    (-100: no target; not shifted), and ``attention_mask``, or with `packing` ``position_ids`` that restart with each document.
    `predict_dataloader` gives prompts, padded on the left, with their reference answers.

    The order of the rows depends on `seed` and the epoch alone. Ranks share each global batch, and a run that is resumed in
    mid-epoch sees the remaining batches exactly (the loader's position is in Lightning's checkpoint).

    Args:
        dataset: The source of the training rows; a list of sources, whose rows are joined; or a mapping from sources to
            weights, the shares that they have in an epoch: rows of a source too small for its share are repeated.
        eval_dataset: Rows for validation. Without it, `val_size` of the training rows.
        test_dataset: Rows for testing and prediction. Without it, the validation rows.
        val_size: Fraction (below 1) or number of rows to split off by `seed` when there is no `eval_dataset`; 0 for none.
        batch_size: Rows in a batch of one rank.
        eval_batch_size: The same outside training; `batch_size` when not given.
        max_seq_length: Longest row in tokens. Longer rows lose the start of their prompt, and the end of their last answer
            only where it alone is too long.
        train_on_prompt: Train on every token, not on the answers alone.
        last_turn_only: Train on the last answer of a conversation alone.
        packing: Put several documents into a training row of `max_seq_length` tokens; they don't see one another.
        group_by_length: Batches of rows of similar length, for less padding.
        data_format: Name of the format, for rows that it can't be recognised from.
        columns: Own column names by the format's names: ``{instruction: question, output: reply}``.
        split: Split of data sets on the hub, and of directories whose file names name splits.
        tokenizer: A tokenizer or the name of one. Without it, the LightningModule's ``tokenizer``.
        num_workers: Processes that collate batches.
        seed: Seed of the split, the mixture and the order.

    Raises:
        UsageError: For a setting out of range.
    """

    def __init__(
        self,
        dataset: str | list[str] | dict[str, float],
        eval_dataset: str | list[str] | None = None,
        test_dataset: str | list[str] | None = None,
        val_size: int | float = 0.05,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_seq_length: int = 512,
        train_on_prompt: bool = False,
        last_turn_only: bool = False,
        packing: bool = False,
        group_by_length: bool = False,
        data_format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None,
        columns: dict[str, str] | None = None,
        split: str = "train",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.eval_dataset = eval_dataset
        self.test_dataset = test_dataset
        self.val_size = val_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_seq_length = max_seq_length
        self.train_on_prompt = train_on_prompt
        self.last_turn_only = last_turn_only
        self.packing = packing
        self.group_by_length = group_by_length
        self.data_format = data_format
        self.columns = columns or {}
        self.split = split
        self.tokenizer = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self._check_settings()
        self._tables: dict[str, datasets.Dataset] = {}
        self._encoded: dict[str, datasets.Dataset] = {}
        self._rows: dict[str, Rows] = {}

    def check(self) -> None:
        """Find all that is wrong with the data and needs no tokenizer to be found: files, their syntax, columns and types.

        Raises:
            UsageError: Names the setting or the row, and what to do.
        """
        for key in ("dataset", "eval_dataset", "test_dataset"):
            if getattr(self, key):
                self._table(key)
        self._split_rows()

    def prepare_data(self) -> None:
        """Read, check and tokenise once, so that other processes find it in the cache of `datasets`."""
        self.check()
        for part in ("train", "val", "test"):
            if key := self._key(part):
                self._tokens(key)

    def setup(self, stage: str | None = None) -> None:
        """Tokenise (or take from the cache) the rows that `stage` needs.

        Raises:
            UsageError: When no row has a target.
        """
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for part in wanted.get(str(stage), ("train", "val", "test")):
            if part not in self._rows and self._key(part):
                self._rows[part] = self._make_rows(part)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training rows, one rank's share of them."""
        rows, (rank, world_size) = self._rows["train"], self._ranks()
        sampler = ShardedSampler(
            rows.lengths,
            rank,
            world_size,
            seed=self.seed,
            group_size=self.batch_size * world_size if self.group_by_length else None,
        )
        loader = ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(collate, pad_token_id=self._pad_token_id, flatten=self.packing and self._check_packable()),
            pin_memory=torch.cuda.is_available(),
        )
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation rows in their order; none when there are no validation rows."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Test rows in their order, with their answers as targets."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """Test rows as prompts, see `PromptRows` and `collate_prompts`."""
        table = self._table(self._key("test") or "dataset").select(self._indices("test"))
        return DataLoader(
            PromptRows(table, self._encoder()),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            collate_fn=partial(collate_prompts, pad_token_id=self._pad_token_id),
        )

    def summary(self) -> dict[str, int]:
        """Figures of the training rows after `setup`: rows, dropped and truncated ones, tokens, targets, validation rows.

        ``rows`` counts what is batched: with packing the packed rows, ``documents`` what they are made of.
        """
        rows = self._rows["train"]
        used = rows.documents.select([document for row in rows.rows for document in row]).with_format("numpy")
        return {
            "rows": len(rows),
            "documents": len(used),
            "dropped_rows": len(self._dropped("dataset")),
            "truncated_rows": int(used["truncated"][:].sum()),
            "tokens": int(used["length"][:].sum()),
            "target_tokens": int(used["targets"][:].sum()),
            "validation_rows": len(self._rows["val"]) if "val" in self._rows else 0,
        }

    def sample_row(self, index: int = 0) -> list[tuple[str, bool]]:
        """A training row after `setup`, decoded: pieces of text, each with whether it is trained."""
        item = self._rows["train"][index]
        trained = np.asarray(item["labels"]) != IGNORED
        edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
        tokenizer = self._encoder().tokenizer
        return [(str(tokenizer.decode(item["input_ids"][a:b])), bool(trained[a])) for a, b in itertools.pairwise(edges)]

    def _check_settings(self) -> None:
        for name, least in {"batch_size": 1, "eval_batch_size": 1, "max_seq_length": 2, "num_workers": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.val_size >= 0 or (isinstance(self.val_size, float) and self.val_size >= 1):
            raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {self.val_size}")
        if not self.dataset:
            raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
        if isinstance(self.dataset, Mapping) and (wrong := [k for k, w in self.dataset.items() if not w > 0]):
            raise UsageError(f"data.dataset: the weight of '{wrong[0]}' must be above 0, got {self.dataset[wrong[0]]}")
        if self.data_format is not None and self.data_format not in FORMATS:
            raise UsageError(f"data.data_format must be one of {', '.join(FORMATS)}, got '{self.data_format}'")
        if unknown := sorted(set(self.columns) - set(formats.COLUMNS)):
            raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
        if self.packing and self.group_by_length:
            raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")

    def _key(self, part: str) -> str | None:
        """The setting that names the source of a part: train, val or test."""
        if part == "test" and self.test_dataset:
            return "test_dataset"
        if part != "train" and self.eval_dataset:
            return "eval_dataset"
        return "dataset" if part == "train" or self.val_size else None

    def _table(self, key: str) -> datasets.Dataset:
        """The examples of a setting's sources, as JSON, each with the words that name its row."""
        if key not in self._tables:
            tables = [self._read(source) for source in self._sources(key)]
            self._tables[key] = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        return self._tables[key]

    def _sources(self, key: str) -> list[Source]:
        names = getattr(self, key)
        return [sources.resolve(name, key, self.split) for name in ([names] if isinstance(names, str) else names)]

    def _read(self, source: Source) -> datasets.Dataset:
        settings = {"data_format": self.data_format, "columns": self.columns}
        fingerprint = _hash(sources.content_hash(source), settings, inspect.getsource(formats), inspect.getsource(sources))
        try:
            return datasets.Dataset.from_generator(
                _examples, features=_TABLE, gen_kwargs={"source": source, **settings}, fingerprint=fingerprint
            )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UsageError):
                raise error.__cause__ from None
            raise

    def _tokens(self, key: str) -> datasets.Dataset:
        """The tokenised documents of a setting's sources, in the order of the rows, those without a target left out."""
        if key not in self._encoded:
            table, encoder = self._table(key), self._encoder()
            settings = [self.max_seq_length, self.train_on_prompt, self.last_turn_only]
            fingerprint = _hash(table._fingerprint, _tokenizer_state(encoder.tokenizer), settings, inspect.getsource(masking))
            processes = min(len(table) // _ROWS_PER_PROCESS, len(os.sched_getaffinity(0)))
            self._encoded[key] = table.map(
                _encode,
                batched=True,
                with_indices=True,
                fn_kwargs={"encoder": encoder},
                remove_columns=table.column_names,
                features=_TOKENS,
                new_fingerprint=fingerprint,
                num_proc=processes if processes > 1 else None,
                desc=f"Tokenising {key}",
            )
            self._report(key)
        return self._encoded[key]

    def _report(self, key: str) -> None:
        documents, dropped = self._encoded[key], self._dropped(key)
        total = len(self._table(key))
        if dropped:
            named = ", ".join(self._table(key)[dropped[:10]]["where"]) + (", ..." if len(dropped) > 10 else "")
            if len(dropped) == total:
                raise UsageError(f"data.{key}: no row has a target token (an answer that is not empty): {named}")
            rank_zero_warn(f"data.{key}: {len(dropped)} of {total} rows have no answer to train on and are left out: {named}")
        if truncated := int(documents.with_format("numpy")["truncated"][:].sum()):
            rank_zero_info(f"data.{key}: {truncated} of {total} rows were cut to max_seq_length={self.max_seq_length} tokens.")

    def _dropped(self, key: str) -> list[int]:
        kept = self._encoded[key].with_format("numpy")["row"][:]
        return np.setdiff1d(np.arange(len(self._table(key))), kept).tolist()

    def _split_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of `dataset` to train on and to validate on."""
        total = len(self._table("dataset"))
        if self.eval_dataset or not self.val_size:
            return np.arange(total), np.arange(0)
        size = self.val_size if isinstance(self.val_size, int) else max(1, round(total * self.val_size))
        if size >= total:
            raise UsageError(f"data.val_size: {self.val_size} of {total} rows leaves none to train on; set val_size: 0")
        order = np.random.default_rng(self.seed).permutation(total)
        return np.sort(order[size:]), np.sort(order[:size])

    def _indices(self, part: str) -> np.ndarray:
        key = self._key(part)
        if key != "dataset":
            return np.arange(len(self._table(str(key))))
        train, val = self._split_rows()
        return self._mix(train) if part == "train" else val

    def _mix(self, rows: np.ndarray) -> np.ndarray:
        """Repeat rows until every source has the share that its weight asks for; no row is left out."""
        if not isinstance(self.dataset, Mapping) or len(self.dataset) == 1:
            return rows
        ends = np.cumsum([len(self._read(source)) for source in self._sources("dataset")])
        parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
        weights = np.asarray(list(self.dataset.values()), dtype=float)
        per_weight = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        random = np.random.default_rng(self.seed)
        mixed = []
        for name, part, weight in zip(self.dataset, parts, weights, strict=True):
            if not len(part):
                raise UsageError(f"data.dataset: '{name}' has no row left to train on; lower val_size or give an eval_dataset")
            size = round(per_weight * weight)
            repeats = [part] * (size // len(part)) + [random.permutation(part)[: size % len(part)]]
            mixed.append(np.concatenate(repeats))
            share = weight / weights.sum()
            rank_zero_info(f"data.dataset: {share:.1%} from {name}: {size} rows an epoch, each {size / len(part):.2f} times.")
        return np.concatenate(mixed)

    def _make_rows(self, part: str) -> Rows:
        documents = self._tokens(str(self._key(part)))
        row_of = documents.with_format("numpy")["row"][:]
        wanted = self._indices(part)
        first, last = np.searchsorted(row_of, wanted, "left"), np.searchsorted(row_of, wanted, "right")
        chosen = [document for a, b in zip(first, last, strict=True) for document in range(a, b)]
        if not chosen:
            raise UsageError(f"data.{self._key(part)}: no row for {part} has an answer to train on")
        if part != "train" or not self.packing:
            return Rows(documents, [[document] for document in chosen])
        lengths = documents.with_format("numpy")["length"][:][chosen].tolist()
        rows = [[chosen[i] for i in row] for row in pack(lengths, self.max_seq_length)]
        return Rows(documents, rows, packed=True)

    def _eval_dataloader(self, part: str) -> DataLoader | list[DataLoader]:
        if part not in self._rows:
            return []
        rows, (rank, world_size) = self._rows[part], self._ranks()
        return DataLoader(
            rows,
            batch_size=self.eval_batch_size,
            sampler=ShardedSampler(rows.lengths, rank, world_size, shuffle=False),
            num_workers=self.num_workers,
            collate_fn=partial(collate, pad_token_id=self._pad_token_id),
            pin_memory=torch.cuda.is_available(),
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _check_packable(self) -> bool:
        """Whether packed rows have to be flattened for the model's attention; an error when the model can't take them."""
        model = getattr(self.trainer.lightning_module, "model", None) if self.trainer else None
        if not isinstance(model, torch.nn.Module):
            return False
        require_position_ids(model)
        return "flash" in str(getattr(model.config, "_attn_implementation", None))

    def _encoder(self) -> Encoder:
        if self.tokenizer is None and self.trainer is not None:
            self.tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if isinstance(self.tokenizer, str):
            from ows_lightning.pretrained import load_tokenizer

            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.tokenizer is None:
            raise UsageError("data.tokenizer: name a tokenizer, since the model brings none")
        tokenizer = with_chat_template(self.tokenizer)
        return Encoder(tokenizer, self.max_seq_length, self.train_on_prompt, self.last_turn_only)

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self._encoder().tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _examples(source: Source, data_format: str | None, columns: Mapping[str, str]) -> Iterator[dict[str, str]]:
    for where, row in sources.read_rows(source):
        renamed = formats.rename(row, columns, where)
        data_format = data_format or formats.recognise(renamed, where)
        yield {"where": where, "example": json.dumps(formats.to_example(renamed, data_format, where), ensure_ascii=False)}


def _encode(batch: dict[str, list[Any]], indices: Sequence[int], encoder: Encoder) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in _TOKENS}
    for index, where, example in zip(indices, batch["where"], batch["example"], strict=True):
        for row in encoder.encode(json.loads(example), where):
            values = (row.input_ids, row.labels, len(row.input_ids), row.num_targets, row.truncated, index)
            for name, value in zip(_TOKENS, values, strict=True):
                columns[name].append(value)
    return columns


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All of a tokenizer that decides about tokens; not its truncation and padding, which calls change."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return [{**backend, "truncation": None, "padding": None}, tokenizer.chat_template, tokenizer.special_tokens_map]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
