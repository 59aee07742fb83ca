"""The LightningDataModule for instruction data."""

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ows_lightning.compat import attn_implementation_of
from ows_lightning.data import formats
from ows_lightning.data.encoding import Encoder
from ows_lightning.data.examples import column, warn_of_dropped
from ows_lightning.data.loaders import RankSampler, ResumableLoader
from ows_lightning.data.multiple_choice import ChoiceRows, collate_choices
from ows_lightning.data.packing import require_separate_documents
from ows_lightning.data.rendering import with_chat_template
from ows_lightning.data.rows import PromptRows, Rows, collate, collate_prompts
from ows_lightning.data.splits import Splits
from ows_lightning.data.stream import StreamLoader, StreamRows, collate_with_state
from ows_lightning.errors import UsageError, did_you_mean
from ows_lightning.fit.duration import micro_batches_per_step
from ows_lightning.models.decoder import language_model_of
from ows_lightning.models.loss import IGNORE_INDEX
from ows_lightning.models.pretrained import load_tokenizer

#: The parts whose rows with targets a stage needs; prompts need none.
_PARTS: dict[str, tuple[str, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
_ALL_PARTS = ("train", "val", "test")
_SMALL_DATASET = 256  # up to this many rows, a batch may be larger than the data
# The ranges of settings. Values that no machine can handle are refused: it would seem to hang.
_BOUNDS = {
    "batch_size": (1, 8192), "eval_batch_size": (1, 8192), "max_seq_length": (2, 1 << 20),
    "exact_match_rows": (0, 1_000_000), "num_workers": (0, 512), "seed": (0, 2**32 - 1),
}  # fmt: skip
_WEIGHT_RANGE = (1e-6, 1e6)  # of the sources of a mixture


class InstructionDataModule(LightningDataModule):
    """Instruction data from files or the hub, tokenised with the model's chat template, with loss only on the answers.

    A source is a ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.tsv`` file (text also as ``.gz``, ``.bz2``, ``.xz`` or
    ``.zst``), a directory or glob of them, a directory written by `datasets.Dataset.save_to_disk`, or a data set on the hub
    (``owner/name[/config][:split]``). The format is recognised from the columns:

    ================== ============================================ ==========================================
    format             columns                                      becomes
    ================== ============================================ ==========================================
    messages           messages (role, content), tools?             the conversation as it is
    sharegpt           conversations (from, value), system?, tools? the conversation
    alpaca             instruction, input?, output, system?         one question and its answer
    prompt_completion  prompt, completion (text or messages)        one question and its answer
    text               text                                         plain text, every token a target
    ================== ============================================ ==========================================

    ``answer`` and ``choices`` are kept for scoring, see `choices_of`; ``answer`` stands in for a missing output or completion.
    To predict, `test_dataset` needs no answers at all.

    Training batches are dicts of int64 tensors (B, L), padded on the right to the longest row: ``input_ids``, ``labels``
    (-100: no target; not shifted), and ``attention_mask``, or with `packing` ``position_ids`` that restart with each document.
    `predict_dataloader` gives prompts, padded on the left, with their reference answers.

    The order of the rows depends only on `seed` and the epoch. Ranks share each global batch, and a run that is resumed in
    mid-epoch sees exactly the remaining batches (the loader's position is in Lightning's checkpoint).

    With `streaming` the training rows are read, tokenised and shuffled a thousand at a time, and never held all at once. The
    run is one endless epoch, which needs the Trainer's ``max_steps``; `val_size` is how many of the first rows validate.

    Args:
        dataset: The source of the training rows; a list of sources, whose rows are joined; or a mapping from sources to
            weights, their shares of an epoch: rows of a source too small for its share are repeated.
        eval_dataset: Rows for validation; without it, `val_size` of the training rows. From a source with splits, the
            validation rows, or else the test rows.
        test_dataset: Rows for testing and prediction, for the latter also without answers; without it, the validation rows.
            From a source with splits, the test rows, or else the validation rows.
        val_size: Fraction (below 1) or number of rows to split off by `seed` when there is no `eval_dataset`; 0 for none.
        batch_size: Rows in a batch of one rank.
        eval_batch_size: The same outside training; `batch_size` when not given.
        max_seq_length: Longest row in tokens. Longer rows lose the start of their prompt; the last answer is cut last.
        train_on_prompt: Train on every token instead of only on the answers.
        last_turn_only: Train only on the last answer of a conversation.
        packing: Put several documents into a training row of `max_seq_length` tokens; they don't see one another.
        group_by_length: Put rows of similar length into a batch, for less padding.
        streaming: Read the training rows as a stream, with at most one worker.
        exact_match_rows: How many validation and test rows (the first ones with an answer) also have their answers generated,
            in a second loader after that of the loss, and compared with the reference.
        data_format: Name of the format, if it can't be recognised from the rows.
        columns: Your column names by the format's names: ``{instruction: question, output: reply}``.
        split: Split of a `dataset` on the hub, or in a directory whose files or folders name splits.
        tokenizer: A tokenizer or its name; without it, the LightningModule's ``tokenizer``.
        num_workers: Processes that collate batches.
        seed: Seed of the split, the mixture and the order.

    Raises:
        UsageError: A setting is out of range.
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
        data_format: formats.DataFormat | None = None,
        columns: dict[str, str] | None = None,
        split: str = "train",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.eval_dataset, self.test_dataset = dataset, eval_dataset, test_dataset
        self.val_size, self.batch_size, self.max_seq_length = val_size, batch_size, max_seq_length
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.train_on_prompt, self.last_turn_only = train_on_prompt, last_turn_only
        self.packing, self.group_by_length, self.streaming = packing, group_by_length, streaming
        self.data_format, self.columns, self.split = data_format, columns or {}, split
        self.exact_match_rows, self.tokenizer, self.num_workers, self.seed = exact_match_rows, tokenizer, num_workers, seed
        check_data_settings(vars(self))
        self._rows: dict[str, Rows] = {}  # by the name of the part: train, val, test
        self._tokenised_by: PreTrainedTokenizerBase | None = None  # `tokenizer`, or the model's
        self._resume_at: dict[str, Any] = {}  # where the next training loader begins

    def check(self, stage: str = "") -> None:
        """Raises a UsageError for what is wrong in the files that `stage` (or the Trainer's) reads; it needs no tokenizer."""
        parts = _PARTS.get(stage := stage or self._stage(), _ALL_PARTS)
        self._splits.check(parts or ("test",), choices=stage == "test" or ("train" in parts and bool(self.test_dataset)))
        if "train" not in parts:
            return
        rows = self.batch_size if self.streaming else len(self._splits.all_examples("dataset"))
        if self.batch_size > max(rows, _SMALL_DATASET):  # the predicted memory would be wrong
            what = f"{self.batch_size} is more than the {rows} rows there are; set it to {rows} or less"
            raise UsageError(f"data.batch_size: {what}")

    def prepare_data(self) -> None:
        """Reads, checks and tokenises once, so that other processes find it in the cache of `datasets`."""
        self.check()
        encoder = self._encoder()
        for part in _PARTS.get(self._stage(), _ALL_PARTS):
            if (key := self._splits.key_of(part)) and len(self._splits.all_examples(key)):
                self._splits.all_tokens(key, encoder)

    def setup(self, stage: str | None = None) -> None:
        """Tokenises (or takes from the cache) the rows that `stage` needs; a UsageError says that none has a target."""
        parts = _PARTS.get(stage or "", _ALL_PARTS)
        self._resume_at = {}  # of a run that failed before it made its loader
        if stage in ("validate", "test", "predict"):
            part, key = ("val", "eval") if stage == "validate" else ("test", "test")
            if self._splits.key_of(part) is None:
                hint = f"{'' if key == 'eval' else 'a test_dataset, '}an eval_dataset or a val_size"
                what_for = "answer" if stage == "predict" else "evaluate"
                raise UsageError(f"data.{key}_dataset: no rows to {what_for}; give {hint}")
        if "train" in parts and (self.packing or self.streaming):
            kind = "packed rows have" if self.packing else "rows of a stream may have"
            self._check_positions(self.max_seq_length, f"{kind} {self.max_seq_length} tokens")
        encoder = self._encoder()
        for part in parts:
            if part not in self._rows and self._splits.key_of(part):
                self._rows[part] = self._splits.rows(part, encoder, self.packing and part == "train")
                longest = max(self._rows[part].lengths)
                self._check_positions(longest, f"data.{self._splits.key_of(part)} has a row of {longest} tokens")

    def train_dataloader(self) -> DataLoader:
        """Shuffled training rows, one rank's share of them."""
        loader = self._stream_dataloader() if self.streaming else self._shuffled_dataloader()
        if self._resume_at:
            loader.load_state_dict(self._resume_at)
            self._resume_at = {}
        return loader

    def val_dataloader(self) -> list[DataLoader]:
        """Validation rows in their order, then `exact_match_rows` of them as prompts; empty without validation rows."""
        return self._eval_dataloaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Test rows in their order, `exact_match_rows` of them as prompts, and each choice of those that have choices."""
        loaders = self._eval_dataloaders("test")
        if len(choices := ChoiceRows(self._splits.examples("test") if loaders else (), self._encoder())):
            loaders.append(self._ordered_dataloader(choices, collate_choices, choices.max_choices))
        return loaders

    def predict_dataloader(self) -> DataLoader:
        """Test rows as prompts, see `PromptRows` and `collate_prompts`."""
        examples, encoder = self._splits.examples("test"), Encoder(self._encoder().tokenizer, train_on_prompt=True)
        rows = [json.loads(example) for example in examples["example"]]
        prompts = [{**row, "messages": formats.split_prompt(row.get("messages", []))[0]} for row in rows]
        unshown = {"row": range(len(rows)), "length": [1] * len(rows), "unshown": [*map(encoder.unshown_parts, prompts)]}
        warn_of_dropped("test_dataset", unshown, examples["where"], f"{len(rows)} rows")
        return self._prompt_dataloader(examples)

    def summary(self) -> dict[str, int]:
        """Figures of the training rows after `setup`: rows, dropped and truncated ones, tokens, targets, validation rows.

        ``rows`` counts what is batched: with packing the packed rows, of ``documents``. Of a stream, only validation rows.
        """
        figures = {"validation_rows": len(self._rows.get("val", ()))}
        if self.streaming:
            return figures
        rows = self._rows["train"]
        documents = [document for row in rows.rows for document in row]
        for name, counted in (("truncated_rows", "truncated"), ("tokens", "length"), ("target_tokens", "targets")):
            figures[name] = int(column(rows.documents, counted)[documents].sum())
        dropped = len(self._splits.indices_without_target("dataset"))
        return {"rows": len(rows), "documents": len(documents), "dropped_rows": dropped, **figures}

    def sample_row(self) -> list[tuple[str, bool]]:
        """The first training row after `setup`, decoded: pieces of text, each with whether it is trained."""
        item = next(iter(self._stream_rows(length=1)))[0] if self.streaming else self._rows["train"][0]
        tokenizer, tokens = self._encoder().tokenizer, zip(item["input_ids"], item["labels"], strict=True)
        pieces = itertools.groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX)
        return [(str(tokenizer.decode([token for token, _ in piece])), trained) for trained, piece in pieces]

    def state_dict(self) -> dict[str, Any]:
        """The position in the training rows."""
        loader = self._training_loader()
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues there with the training loader, or with the next one that is made.

        Lightning gives the position to a loader that it makes when training starts, but not to one that exists already
        because a schedule has asked for the number of steps, before this call (FSDP2) or after it.
        """
        if self._stage() != "fit":
            return
        if ("examples" in state_dict) != self.streaming:
            raise UsageError(f"data.streaming: the checkpoint is of a run with {not self.streaming}; set it so, or start anew")
        if (loader := self._training_loader()) is None:
            self._resume_at = state_dict
        else:
            loader.load_state_dict(state_dict)

    def _training_loader(self) -> ResumableLoader | StreamLoader | None:
        loader = self.trainer.train_dataloader if self.trainer else None
        return loader if isinstance(loader, (ResumableLoader, StreamLoader)) else None

    def _stage(self) -> str:
        """The Trainer's stage: fit, validate, test or predict; empty if there is none."""
        stage = self.trainer.state.fn if self.trainer else None
        return stage.value if stage else ""

    def _check_positions(self, length: int, what: str, generated: int = 0) -> None:
        """Refuses rows that are longer than what the model has positions for."""
        exceeded = getattr(self.trainer and self.trainer.lightning_module, "exceeded_position_limit", lambda _: None)
        if (limit := exceeded(length + generated)) is not None:
            hint = f"set data.max_seq_length: {max(limit - generated, 2)} or less"
            raise UsageError(f"data.max_seq_length: {what}, and the model has positions for {limit}; {hint}")

    @cached_property
    def _splits(self) -> Splits:
        names = (field.name for field in dataclasses.fields(Splits) if field.init)
        return Splits(**{name: getattr(self, name) for name in names})

    def _shuffled_dataloader(self) -> ResumableLoader:
        rows, (rank, world_size) = self._rows["train"], self._ranks()
        group_size = self.batch_size * world_size if self.group_by_length else None
        sampler = RankSampler(rows.lengths, rank, world_size, seed=self.seed, group_size=group_size)
        options = self._loader_options(self.batch_size, self.num_workers, self._collate_training())
        loader = ResumableLoader(rows, sampler=sampler, **options)
        loader.trainer = self.trainer
        return loader

    def _loader_options(self, batch_size: int, workers: int, collate_fn: Any) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate_fn, "pin_memory": on_gpu}

    def _eval_dataloaders(self, part: str) -> list[DataLoader]:
        if part not in self._rows:
            return []
        loss = self._ordered_dataloader(self._rows[part], collate)
        if not self.exact_match_rows:
            return [loss]
        examples = self._splits.examples(part)
        conversations = ((i, json.loads(entry["example"]).get("messages", [])) for i, entry in enumerate(examples))
        answered = (i for i, chat in conversations if formats.split_prompt(chat)[1].strip() and chat[-1].get("weight", 1))
        first = list(itertools.islice(answered, self.exact_match_rows))
        return [loss, self._prompt_dataloader(examples.select(first))] if first else [loss]

    def _prompt_dataloader(self, examples: Any) -> DataLoader:
        prompts = PromptRows(examples, self._encoder())
        whole = PromptRows(examples, Encoder(prompts.encoder.tokenizer))
        rows, tokenizer = [whole[i] for i in range(len(whole))], whole.encoder.tokenizer
        lengths = [len(row["input_ids"]) for row in rows]
        answers = [row["expected"] or row["reference"] for row in rows]
        references = [len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
        if cut := sum(length > self.max_seq_length for length in lengths):
            rank_zero_warn(f"data.max_seq_length: {cut} of {len(lengths)} prompts have more tokens, and lose their start")
        model = self.trainer.lightning_module if self.trainer else None
        if (generated := getattr(model, "hparams", {}).get("max_new_tokens")) is not None:
            longest = min(max(lengths, default=0), self.max_seq_length)
            what = f"a prompt has {longest} tokens, to which model.max_new_tokens adds {generated}"
            self._check_positions(longest, what, generated)
            if cut := sum(length > generated for length in references):
                rank_zero_warn(f"model.max_new_tokens: {cut} of {len(references)} answers are longer, and can't match")
        return self._ordered_dataloader(prompts, collate_prompts)

    def _ordered_dataloader(
        self, rows: Rows | PromptRows | ChoiceRows, collate_rows: Callable[..., Any], sequences: int = 1
    ) -> DataLoader:
        """One rank's part of rows, in order, each of at most ``sequences`` sequences; all ranks have as many batches."""
        sampler = RankSampler(range(len(rows)), *self._ranks(), shuffle=False)
        collate_fn = partial(collate_rows, pad_token_id=self._pad_token_id)
        options = self._loader_options(max(1, self.eval_batch_size // sequences), self.num_workers, collate_fn)
        return DataLoader(rows, sampler=sampler, **options)

    def _stream_dataloader(self) -> StreamLoader:
        if (trainer := self.trainer) is None or trainer.max_steps < 1:
            raise UsageError("data.streaming: a stream has no end; set trainer.max_steps")
        # A known length keeps Lightning from fetching a batch ahead, which checkpoints would count as seen; it warns of it.
        rows = self._stream_rows(trainer.max_steps * micro_batches_per_step(trainer) * self.batch_size)
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        collate_fn = partial(collate_with_state, collate=self._collate_training())
        return StreamLoader(rows, **self._loader_options(self.batch_size, min(self.num_workers, 1), collate_fn))

    def _stream_rows(self, length: int) -> StreamRows:
        sources = [self.dataset] if isinstance(self.dataset, (str, Path)) else self.dataset
        names = [Path(source).name for source in sources]  # their folder may have been moved
        stream, encoder = self._splits.training_stream(), self._encoder()
        return StreamRows(stream, encoder, length, self.packing, *self._ranks(), self.seed, names)

    def _collate_training(self) -> Any:
        """`collate`; packed rows are flattened where the attention needs it, and refused where the model mixes documents."""
        flatten = False
        if self.packing and self.trainer and hasattr(model := language_model_of(self.trainer.lightning_module), "config"):
            flatten = "flash" in str(attn_implementation_of(model.config))
            with self.trainer.precision_plugin.forward_context():
                require_separate_documents(self.trainer.lightning_module, flatten)
        return partial(collate, pad_token_id=self._pad_token_id, flatten=flatten)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _encoder(self) -> Encoder:
        """With `tokenizer`, or else that of the model, which may be another one than in an earlier fit."""
        if isinstance(self.tokenizer, str):
            try:
                self.tokenizer = load_tokenizer(self.tokenizer)
            except UsageError as error:
                raise UsageError(str(error).replace("model.model_name_or_path", "data.tokenizer")) from None
        model = self.trainer and self.trainer.lightning_module
        tokenizer: PreTrainedTokenizerBase | None = self.tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise UsageError("data.tokenizer: name a tokenizer, since the model brings none")
        if tokenizer is not self._tokenised_by:
            own = getattr(model, "tokenizer", tokenizer)  # which generation and the exported model use
            with_chat_template(tokenizer)
            if (tokenizer.chat_template, tokenizer.get_vocab()) != (own.chat_template, own.get_vocab()):
                hint = "leave it out, or give the model a directory that has this one"
                raise UsageError(f"data.tokenizer: the model has another tokenizer or chat template; {hint}")
            self._tokenised_by = tokenizer
            self._rows.clear()
            self._splits.tokens.clear()
        return Encoder(tokenizer, self.max_seq_length, self.train_on_prompt, self.last_turn_only)

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self._encoder().tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_data_settings(settings: Mapping[str, Any]) -> None:
    """Raises a UsageError for the first of the data module's settings, by name, that is wrong without a look at the rows."""
    for name, (least, most) in _BOUNDS.items():
        if not (isinstance(value := settings[name], Integral) and least <= int(value) <= most):
            raise UsageError(f"data.{name} must be a whole number from {least} to {most}, got {value}")
    if (name := settings["data_format"]) is not None and name not in formats.FORMATS:
        raise UsageError(f"data.data_format: unknown '{name}'{did_you_mean(name, formats.FORMATS) or '; leave it out'}")
    size, sources = settings["val_size"], settings["dataset"]
    if not (0 <= size < 1 or (size >= 1 and isinstance(size, int))):
        raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {size}")
    if not sources:
        raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
    if isinstance(sources, Mapping):
        for source, weight in sources.items():
            if not _WEIGHT_RANGE[0] <= weight <= _WEIGHT_RANGE[1]:
                allowed = "from {:g} to {:g}".format(*_WEIGHT_RANGE)
                raise UsageError(f"data.dataset: the weight of '{source}' must be {allowed}, got {weight!r}")
    if unknown := sorted(set(settings["columns"]) - set(formats.COLUMNS)):
        raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
    if settings["train_on_prompt"] and settings["last_turn_only"]:
        raise UsageError("data.last_turn_only: train_on_prompt trains all tokens of a conversation; set one of the two")
    if settings["packing"] and settings["group_by_length"]:
        raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")
    if settings["streaming"] and settings["group_by_length"]:
        raise UsageError("data.group_by_length: the rows of a stream can't be sorted by length; set it to false")
    if settings["streaming"] and size and not settings["eval_dataset"]:
        if isinstance(size, float):
            raise UsageError(f"data.val_size: {size} of a stream is not known; give a number of rows, or 0")
        if isinstance(sources, Mapping):
            raise UsageError("data.val_size: a mixture repeats rows, also those for validation; give an eval_dataset, or 0")
