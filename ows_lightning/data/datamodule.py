"""The LightningDataModule for instruction data."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ows_lightning.data import formats
from ows_lightning.data.examples import EXAMPLES, column, mix, read_examples, stream_examples, tokenise
from ows_lightning.data.formats import split_prompt
from ows_lightning.data.loaders import PromptRows, ResumableLoader, Rows, ShardedSampler, collate, collate_prompts
from ows_lightning.data.masking import IGNORED, Encoder, with_chat_template
from ows_lightning.data.multiple_choice import ChoiceRows, choices_of, collate_choices
from ows_lightning.data.packing import pack, require_separate_documents
from ows_lightning.data.sources import resolve
from ows_lightning.data.stream import StreamLoader, StreamRows, collate_with_state
from ows_lightning.errors import UsageError

#: The parts whose rows with targets a stage needs; prompts need none.
_PARTS: dict[str, tuple[str, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
_ALL_PARTS = ("train", "val", "test")


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

    ``answer`` and ``choices`` are kept for scoring, see `choices_of`; where a test set has no output or completion, ``answer``
    stands in for it. To predict, `test_dataset` needs no answers at all.

    Training batches are dicts of int64 tensors (B, L), padded on the right to the longest row: ``input_ids``, ``labels``
    (-100: no target; not shifted), and ``attention_mask``, or with `packing` ``position_ids`` that restart with each document.
    `predict_dataloader` gives prompts, padded on the left, with their reference answers.

    The order of the rows depends on `seed` and the epoch alone. Ranks share each global batch, and a run that is resumed in
    mid-epoch sees the remaining batches exactly (the loader's position is in Lightning's checkpoint).

    With `streaming` the training rows are never held as a whole: they are read, tokenised and shuffled a thousand at a time.
    The run is then one endless epoch, which needs the Trainer's ``max_steps``; `val_size` counts the first rows of the stream.

    Args:
        dataset: The source of the training rows; a list of sources, whose rows are joined; or a mapping from sources to
            weights, the shares that they have in an epoch: rows of a source too small for its share are repeated.
        eval_dataset: Rows for validation. Without it, `val_size` of the training rows. Of a source with splits those for
            validation, or for testing where there are none.
        test_dataset: Rows for testing and prediction, for the latter also without answers. Without it, the validation rows.
            Of a source with splits those for testing, or for validation where there are none.
        val_size: Fraction (below 1) or number of rows to split off by `seed` when there is no `eval_dataset`; 0 for none.
        batch_size: Rows in a batch of one rank.
        eval_batch_size: The same outside training; `batch_size` when not given.
        max_seq_length: Longest row in tokens. Longer rows lose the start of their prompt, and the end of their last answer
            only where it alone is too long.
        train_on_prompt: Train on every token, not on the answers alone.
        last_turn_only: Train on the last answer of a conversation alone.
        packing: Put several documents into a training row of `max_seq_length` tokens; they don't see one another.
        group_by_length: Batches of rows of similar length, for less padding.
        streaming: Read the training rows as a stream, with at most one worker.
        exact_match_rows: Validation and test rows (the first ones with an answer) whose answers are also generated, in a
            second loader after that of the loss, for comparison with the reference.
        data_format: Name of the format, for rows that it can't be recognised from.
        columns: Own column names by the format's names: ``{instruction: question, output: reply}``.
        split: Split of a `dataset` on the hub, or in a directory whose files or folders name splits.
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
        streaming: bool = False,
        exact_match_rows: int = 0,
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
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_seq_length = max_seq_length
        self.train_on_prompt = train_on_prompt
        self.last_turn_only = last_turn_only
        self.packing = packing
        self.group_by_length = group_by_length
        self.streaming = streaming
        self.exact_match_rows = exact_match_rows
        self.data_format = data_format
        self.columns = columns or {}
        self.split = split
        self.tokenizer = tokenizer
        self.num_workers = num_workers
        self.seed = seed
        self._check_settings()
        self._resume_at: dict[str, Any] = {}  # where the next training loader begins
        self._examples: dict[str, datasets.Dataset] = {}  # by the name of the setting
        self._tokens: dict[str, datasets.Dataset] = {}
        self._rows: dict[str, Rows] = {}  # by the name of the part: train, val, test

    def check(self) -> None:
        """Find all that is wrong with the data and needs no tokenizer to be found: files, their syntax, columns and types.

        Raises:
            UsageError: Names the setting or the row, and what to do.
        """
        for key in ("dataset", "eval_dataset", "test_dataset"):
            if getattr(self, key):
                self._examples_of(key)
        self._split_rows()
        if self.test_dataset or self._stage() == "test":
            self._check_choices()

    def prepare_data(self) -> None:
        """Read, check and tokenise once, so that other processes find it in the cache of `datasets`."""
        self.check()
        for part in _PARTS.get(self._stage(), _ALL_PARTS):
            if (key := self._key(part)) and len(self._examples_of(key)):
                self._tokens_of(key)

    def setup(self, stage: str | None = None) -> None:
        """Tokenise (or take from the cache) the rows that `stage` needs.

        Raises:
            UsageError: When no row has a target.
        """
        for part in _PARTS.get(stage or "", _ALL_PARTS):
            if part not in self._rows and self._key(part):
                self._rows[part] = self._make_rows(part)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training rows, one rank's share of them."""
        loader = self._stream_dataloader() if self.streaming else self._shuffled_dataloader()
        if self._resume_at:
            loader.load_state_dict(self._resume_at)
            self._resume_at = {}
        return loader

    def _shuffled_dataloader(self) -> ResumableLoader:
        rows, (rank, world_size) = self._rows["train"], self._ranks()
        group_size = self.batch_size * world_size if self.group_by_length else None
        sampler = ShardedSampler(rows.lengths, rank, world_size, seed=self.seed, group_size=group_size)
        loader = ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate_training(),
            pin_memory=self._trains_on_gpu,
        )
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> list[DataLoader]:
        """Validation rows in their order, then `exact_match_rows` of them as prompts; empty without validation rows."""
        return self._eval_dataloaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Test rows in their order, `exact_match_rows` of them as prompts, and each choice of those that have choices."""
        loaders = self._eval_dataloaders("test")
        examples = self._examples_of(str(self._key("test"))).select(self._indices("test")) if loaders else ()
        if len(choices := ChoiceRows(examples, self._encoder())):
            loaders.append(self._ordered_dataloader(choices, collate_choices))
        return loaders

    def predict_dataloader(self) -> DataLoader:
        """Test rows as prompts, see `PromptRows` and `collate_prompts`."""
        if self._key("test") is None:
            raise UsageError("data.test_dataset: no rows to answer; give a test_dataset, an eval_dataset or a val_size")
        return self._prompt_dataloader("test", self._indices("test"))

    def state_dict(self) -> dict[str, Any]:
        """The position in the training rows."""
        loader = self._training_loader()
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there with the training loader, or with the next one.

        Lightning tells the position to a loader that it makes when training starts, and not to one that it made before,
        as it does where a schedule asks for the number of steps: before this call (FSDP2) or after it.
        """
        if self._stage() != "fit":
            return
        loader = self._training_loader()
        if loader is None:
            self._resume_at = state_dict
        else:
            loader.load_state_dict(state_dict)

    def _training_loader(self) -> ResumableLoader | StreamLoader | None:
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader if isinstance(loader, (ResumableLoader, StreamLoader)) else None

    def summary(self) -> dict[str, int]:
        """Figures of the training rows after `setup`: rows, dropped and truncated ones, tokens, targets, validation rows.

        ``rows`` counts what is batched: with packing the packed rows, ``documents`` what they are made of. Of a stream only
        the validation rows are known.
        """
        validation_rows = len(self._rows["val"]) if "val" in self._rows else 0
        if self.streaming:
            return {"validation_rows": validation_rows}
        rows = self._rows["train"]
        documents = [document for row in rows.rows for document in row]
        return {
            "rows": len(rows),
            "documents": len(documents),
            "dropped_rows": len(self._dropped("dataset")),
            "truncated_rows": int(column(rows.documents, "truncated")[documents].sum()),
            "tokens": int(column(rows.documents, "length")[documents].sum()),
            "target_tokens": int(column(rows.documents, "targets")[documents].sum()),
            "validation_rows": validation_rows,
        }

    def sample_row(self, index: int = 0) -> list[tuple[str, bool]]:
        """A training row after `setup`, decoded: pieces of text, each with whether it is trained."""
        item = next(iter(self._stream_rows(length=1)))[0] if self.streaming else self._rows["train"][index]
        trained = np.asarray(item["labels"]) != IGNORED
        edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(trained)]
        tokenizer = self._encoder().tokenizer
        return [(str(tokenizer.decode(item["input_ids"][a:b])), bool(trained[a])) for a, b in itertools.pairwise(edges)]

    def _stage(self) -> str:
        """What the Trainer is about to do: fit, validate, test, predict; empty where it does not say."""
        stage = self.trainer.state.fn if self.trainer else None
        return stage.value if stage else ""

    def _check_settings(self) -> None:
        least = {"batch_size": 1, "eval_batch_size": 1, "max_seq_length": 2, "exact_match_rows": 0, "num_workers": 0}
        for name, bound in {**least, "seed": 0}.items():
            if getattr(self, name) < bound:
                raise UsageError(f"data.{name} must be at least {bound}, got {getattr(self, name)}")
        if not self.val_size >= 0 or (isinstance(self.val_size, float) and self.val_size >= 1):
            raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {self.val_size}")
        if not self.dataset:
            raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
        if isinstance(self.dataset, Mapping) and (wrong := [k for k, w in self.dataset.items() if not w > 0]):
            raise UsageError(f"data.dataset: the weight of '{wrong[0]}' must be above 0, got {self.dataset[wrong[0]]}")
        if self.data_format is not None and self.data_format not in formats.FORMATS:
            raise UsageError(f"data.data_format must be one of {', '.join(formats.FORMATS)}, got '{self.data_format}'")
        if unknown := sorted(set(self.columns) - set(formats.COLUMNS)):
            raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
        if self.streaming and not self.eval_dataset and isinstance(self.val_size, float) and self.val_size:
            raise UsageError(f"data.val_size: {self.val_size} of a stream is not known; give a number of rows, or 0")
        if self.streaming and not self.eval_dataset and self.val_size and isinstance(self.dataset, Mapping):
            raise UsageError(
                "data.val_size: a mixture repeats rows, also those held out of its stream; give an eval_dataset, or 0"
            )
        if self.streaming and self.group_by_length:
            raise UsageError("data.group_by_length: the rows of a stream can't be sorted by length; set it to false")
        if self.packing and self.group_by_length:
            raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")

    def _check_choices(self) -> None:
        """Find a test row whose answer is none of its choices."""
        if key := self._key("test"):
            for entry in self._examples_of(key).select(self._indices("test")):
                choices_of(json.loads(entry["example"]), entry["where"])

    # Parts (train, val, test), and the settings that say where their rows come from.

    def _key(self, part: str) -> str | None:
        if part == "test" and self.test_dataset:
            return "test_dataset"
        if part != "train" and self.eval_dataset:
            return "eval_dataset"
        if part == "train":
            return None if self.streaming else "dataset"
        return "dataset" if self.val_size else None

    def _indices(self, part: str) -> np.ndarray:
        """The examples of a part, by their index in what its setting names."""
        key = self._key(part)
        if key != "dataset":
            return np.arange(len(self._examples_of(str(key))))
        train, val = self._split_rows()
        return self._mixed(train) if part == "train" else val

    def _split_rows(self) -> tuple[np.ndarray, np.ndarray]:
        total = len(self._examples_of("dataset"))
        if self.streaming:
            return np.arange(0), np.arange(total)
        if self.eval_dataset or not self.val_size:
            return np.arange(total), np.arange(0)
        size = self.val_size if isinstance(self.val_size, int) else max(1, round(total * self.val_size))
        if size >= total:
            raise UsageError(f"data.val_size: {self.val_size} of {total} rows leaves none to train on; set val_size: 0")
        order = np.random.default_rng(self.seed).permutation(total)
        return np.sort(order[size:]), np.sort(order[:size])

    def _mixed(self, rows: np.ndarray) -> np.ndarray:
        if not isinstance(self.dataset, Mapping):
            return rows
        ends = np.cumsum([len(table) for table in self._tables("dataset")])
        parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
        for name, part in zip(self.dataset, parts, strict=True):
            if not len(part):
                raise UsageError(f"data.dataset: '{name}' has no row left to train on; lower val_size or give an eval_dataset")
        mixed = mix(parts, list(self.dataset.values()), self.seed)
        for name, part, repeated in zip(self.dataset, parts, mixed, strict=True):
            rank_zero_info(
                f"data.dataset: {name} gives {len(repeated)} rows an epoch, each {len(repeated) / len(part):.2f} times."
            )
        return np.concatenate(mixed)

    def _make_rows(self, part: str) -> Rows:
        key = str(self._key(part))
        documents = self._tokens_of(key)
        row_of, wanted = column(documents, "row"), self._indices(part)
        first, last = np.searchsorted(row_of, wanted, "left"), np.searchsorted(row_of, wanted, "right")
        chosen = [document for a, b in zip(first.tolist(), last.tolist(), strict=True) for document in range(a, b)]
        if not len(documents):
            raise UsageError(
                f"data.{key}: none of {len(self._examples_of(key))} rows has a target token (an answer that is not empty): "
                f"{self._named(key, self._dropped(key))}{'; `predict` needs none' if part == 'test' else ''}"
            )
        if not chosen:
            raise UsageError(f"data.{key}: no row for {part} has an answer to train on")
        if part != "train" or not self.packing:
            return Rows(documents, [[document] for document in chosen])
        packed = pack(column(documents, "length")[chosen].tolist(), self.max_seq_length)
        return Rows(documents, [[chosen[i] for i in row] for row in packed], packed=True)

    # Examples and tokens of a setting.

    def _tables(self, key: str) -> list[datasets.Dataset]:
        names = getattr(self, key)
        found = [resolve(name, key, self.split) for name in ([names] if isinstance(names, str) else names)]
        return [read_examples(source, self.data_format, self.columns) for source in found]

    def _examples_of(self, key: str) -> datasets.Dataset:
        if key not in self._examples:
            if key == "dataset" and self.streaming:
                held_out = 0 if self.eval_dataset else int(self.val_size)
                first = list(self._stream_examples().take(held_out + 1))  # one more, which tells whether there are others
                if len(first) <= held_out:
                    raise UsageError(
                        f"data.val_size: {held_out} of {len(first)} rows leaves none to train on; lower it, or set val_size: 0"
                    )
                self._examples[key] = datasets.Dataset.from_dict(
                    {name: [row[name] for row in first[:held_out]] for name in EXAMPLES}, features=EXAMPLES
                )
            else:
                self._examples[key] = datasets.concatenate_datasets(self._tables(key))
        return self._examples[key]

    def _tokens_of(self, key: str) -> datasets.Dataset:
        if key not in self._tokens:
            self._tokens[key] = tokenise(self._examples_of(key), self._encoder(), key)
            self._report(key)
        return self._tokens[key]

    def _report(self, key: str) -> None:
        """Say which rows have no target, and how many were cut."""
        dropped, total = self._dropped(key), len(self._examples_of(key))
        if 0 < len(dropped) < total:
            named = self._named(key, dropped)
            rank_zero_warn(f"data.{key}: {len(dropped)} of {total} rows have no answer to train on and are left out: {named}")
        if (documents := len(self._tokens[key])) > total - len(dropped):
            rank_zero_info(
                f"data.{key}: {total - len(dropped)} rows became {documents}, since the template rewrites earlier answers:"
                " each is trained at the end of a row of its own."
            )
        if truncated := int(column(self._tokens[key], "truncated").sum()):
            rank_zero_info(
                f"data.{key}: {truncated} of {documents} rows were cut to max_seq_length={self.max_seq_length} tokens."
            )

    def _named(self, key: str, rows: list[int]) -> str:
        """Where the rows stand, of many the first ones."""
        return ", ".join(self._examples_of(key)[rows[:10]]["where"]) + (", ..." if len(rows) > 10 else "")

    def _dropped(self, key: str) -> list[int]:
        return np.setdiff1d(np.arange(len(self._examples_of(key))), column(self._tokens[key], "row")).tolist()

    def _stream_examples(self) -> datasets.IterableDataset:
        names = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        found = [resolve(name, "dataset", self.split) for name in names]
        streams = [stream_examples(source, self.data_format, self.columns) for source in found]
        if not isinstance(self.dataset, Mapping) or len(streams) == 1:
            return datasets.concatenate_datasets(streams)
        weights = np.asarray(list(self.dataset.values()), dtype=float)
        shares = (weights / weights.sum()).tolist()
        return datasets.interleave_datasets(streams, shares, seed=self.seed, stopping_strategy="all_exhausted")

    # Loaders.

    def _eval_dataloaders(self, part: str) -> list[DataLoader]:
        if part not in self._rows:
            return []
        loss = self._ordered_dataloader(self._rows[part], collate)
        if not self.exact_match_rows:
            return [loss]
        rows = self._with_reference(part)
        return [loss, self._prompt_dataloader(part, rows)] if len(rows) else [loss]

    def _with_reference(self, part: str) -> np.ndarray:
        """The first `exact_match_rows` examples of a part that end with an answer, to compare a generated one with."""
        table = self._examples_of(str(self._key(part)))
        conversations = ((i, json.loads(table[i]["example"]).get("messages", [])) for i in self._indices(part).tolist())
        answered = (i for i, messages in conversations if split_prompt(messages)[1].strip())
        return np.fromiter(itertools.islice(answered, self.exact_match_rows), dtype=np.int64)

    def _prompt_dataloader(self, part: str, rows: np.ndarray) -> DataLoader:
        prompts = PromptRows(self._examples_of(str(self._key(part))).select(rows), self._encoder())
        return self._ordered_dataloader(prompts, collate_prompts)

    def _ordered_dataloader(self, rows: Rows | PromptRows | ChoiceRows, collate_rows: Callable[..., Any]) -> DataLoader:
        """One rank's share of rows in their order, filled up so that all ranks have as many batches."""
        return DataLoader(
            rows,
            batch_size=self.eval_batch_size,
            sampler=ShardedSampler(range(len(rows)), *self._ranks(), shuffle=False),
            num_workers=self.num_workers,
            collate_fn=partial(collate_rows, pad_token_id=self._pad_token_id),
            pin_memory=self._trains_on_gpu,
        )

    def _stream_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise UsageError("data.streaming: a stream has no end; set trainer.max_steps")
        # A known length keeps Lightning from fetching a batch ahead, which checkpoints would count as seen; it warns of it.
        rows = self._stream_rows(trainer.max_steps * trainer.accumulate_grad_batches * self.batch_size)
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        return StreamLoader(
            rows,
            batch_size=self.batch_size,
            num_workers=min(self.num_workers, 1),
            collate_fn=partial(collate_with_state, collate=self._collate_training()),
            pin_memory=self._trains_on_gpu,
        )

    def _stream_rows(self, length: int) -> StreamRows:
        examples = self._stream_examples().skip(len(self._examples_of("dataset"))).repeat(None)
        rank, world_size = self._ranks()
        return StreamRows(examples, self._encoder(), length, self.packing, rank, world_size, self.seed)

    def _collate_training(self) -> Any:
        """`collate`; packed rows are flattened where the attention needs it, and refused where the model mixes documents."""
        modules = self.trainer.lightning_module.modules() if self.trainer else ()
        model: Any = next((m for m in modules if hasattr(m, "generate") and hasattr(m, "config")), None)
        flatten = False
        if self.packing and self.trainer and model is not None:
            flatten = "flash" in str(model.config._attn_implementation)
            with self.trainer.precision_plugin.forward_context():
                require_separate_documents(model, flatten)
        return partial(collate, pad_token_id=self._pad_token_id, flatten=flatten)

    @property
    def _trains_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _encoder(self) -> Encoder:
        if self.tokenizer is None and self.trainer is not None:
            self.tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if isinstance(self.tokenizer, str):
            from ows_lightning.models.pretrained import load_tokenizer

            try:
                self.tokenizer = load_tokenizer(self.tokenizer)
            except UsageError as error:
                raise UsageError(str(error).replace("model.model_name_or_path", "data.tokenizer")) from None
        if self.tokenizer is None:
            raise UsageError("data.tokenizer: name a tokenizer, since the model brings none")
        tokenizer = with_chat_template(self.tokenizer)
        return Encoder(tokenizer, self.max_seq_length, self.train_on_prompt, self.last_turn_only)

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self._encoder().tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
