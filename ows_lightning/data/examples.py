"""Tables and streams of examples, and tables of their tokens, through the `datasets` library and its cache."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import tokenizers
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ows_lightning.compat import fingerprint
from ows_lightning.data import encoding, formats, masking, rendering, sources
from ows_lightning.data.encoding import Encoded, Encoder
from ows_lightning.data.formats import Row
from ows_lightning.data.sources import DataSource
from ows_lightning.errors import UsageError, not_writable

if TYPE_CHECKING:
    import datasets

_ROWS_PER_PROCESS = 5000


def example_features() -> datasets.Features:
    """The columns of a table of examples: ``example`` is JSON, which keeps rows apart that a typed column would unify.

    ``where`` has the words that name the row in messages, ``renamed`` those of the user's column names that it has.
    """
    from datasets import Features, List, Value

    # A new Value each: datasets' fingerprint of a shared one differs from that of two equal ones, which the cache gives.
    return Features({"where": Value("string"), "example": Value("string"), "renamed": List(Value("string"))})


def token_features() -> datasets.Features:
    """The columns of a table of documents: ``row`` is the index of the example, which may give several.

    An example without a target gives one of length 0. ``unshown`` says what of it the chat template leaves out.
    """
    from datasets import Features, List, Value

    ids = {name: List(Value("int32")) for name in ("input_ids", "labels")}
    numbers = {"length": Value("int32"), "targets": Value("int32"), "truncated": Value("bool"), "row": Value("int64")}
    return Features({**ids, **numbers, "unshown": List(Value("string"))})


def read_examples(source: DataSource, data_format: str | None, columns: Mapping[str, str]) -> datasets.Dataset:
    """Reads and checks all rows of a source, or takes them from the cache: a table with the columns `example_features`."""
    import datasets

    arguments = {"source": source, "data_format": data_format, "columns": dict(columns)}
    key = _hash(sources.content_hash(source), source.name, source.requires_answer, data_format, dict(columns), _versions())
    features = example_features()
    try:
        return datasets.Dataset.from_generator(_examples, features=features, gen_kwargs=arguments, fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, UsageError):
            raise cause or error from None
        raise source.error(f"the rows of '{source.name}' can't be read: {type(cause).__name__}: {cause}") from cause
    except OSError as error:
        raise not_writable("HF_DATASETS_CACHE", Path(datasets.config.HF_DATASETS_CACHE), error) from error


def stream_examples(source: DataSource, data_format: str | None, columns: Mapping[str, str]) -> datasets.IterableDataset:
    """The same as a stream, whose rows are checked as they come."""
    import datasets

    arguments = {"source": source, "data_format": data_format, "columns": dict(columns)}
    features = example_features()
    if source.files:
        return datasets.IterableDataset.from_generator(_examples, features=features, gen_kwargs=arguments)
    rows = sources.open_dataset(source, streaming=True)
    names = rows.column_names or list(next(iter(rows)))
    return rows.map(_stream_row, with_indices=True, fn_kwargs=arguments, remove_columns=names, features=features)


def tokenise(examples: datasets.Dataset, encoder: Encoder, name: str) -> datasets.Dataset:
    """Encodes all examples on all cores, or takes them from the cache, whose key is content, tokenizer and settings."""
    tokenizer, settings = encoder.tokenizer, [encoder.max_seq_length, encoder.train_on_prompt, encoder.last_turn_only]
    backend = {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}  # which calls change
    state = [backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(len(examples) // _ROWS_PER_PROCESS, cores)
    return examples.map(
        encode, batched=True, with_indices=True, fn_kwargs={"encoder": encoder}, remove_columns=examples.column_names,
        features=token_features(), num_proc=processes if processes > 1 else None, desc=f"Tokenising {name}",
        new_fingerprint=_hash(fingerprint(examples), state, settings, _versions()),
    )  # fmt: skip


def column(table: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array."""
    return table.with_format("numpy")[name][:]


def _examples(source: DataSource, data_format: str | None, columns: Mapping[str, str]) -> Iterator[Row]:
    for row_name, row in sources.read_rows(source):
        data_format, entry = table_row(row, row_name, source, data_format, columns)  # the first row tells it for all
        yield entry


def _stream_row(row: Row, index: int, source: DataSource, data_format: str | None, columns: Mapping[str, str]) -> Row:
    row = sources.drop_arrow_nulls(dict(row))
    return table_row(row, f"{source.name} row {index + 1}", source, data_format, columns)[1]


def table_row(
    row: Row, row_name: str, source: DataSource, data_format: str | None, columns: Mapping[str, str]
) -> tuple[str, Row]:
    """Returns a row's format, recognised if none is given, and its columns as in `example_features`; errors name the row."""
    renamed = formats.rename(row, columns, row_name, source.requires_answer)
    data_format = data_format or formats.recognise(renamed, row_name, source.requires_answer, columns)
    try:
        content = formats.to_example(renamed, data_format, row_name, source.requires_answer)
        example = json.dumps(content, ensure_ascii=False, default=str)
        example.encode()
    except UsageError:
        raise
    except Exception as error:  # rows may hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"{row_name} can't be read as {data_format}: {reason}") from error
    return data_format, {"where": row_name, "example": example, "renamed": [own for own in columns.values() if own in row]}


def encode(
    batch: dict[str, list[str]], indices: Sequence[int], encoder: Encoder, find_unshown: bool = True
) -> dict[str, list[Any]]:
    """Encodes a batch of examples into the columns of `token_features`."""
    rows = []
    for index, row_name, example in zip(indices, batch["where"], batch["example"], strict=True):
        content = json.loads(example)
        unshown = encoder.unshown_parts(content) if find_unshown else []
        for row in encoder.encode(content, row_name) or [Encoded([], [], truncated=False)]:
            rows.append((row.input_ids, row.labels, len(row.input_ids), row.num_targets, row.truncated, index, unshown))
    return {name: [row[i] for row in rows] for i, name in enumerate(token_features())}


def warn_of_dropped(key: str, documents: Any, where: Sequence[str], among: str) -> None:
    """Warns of rows without a target, and of those of which the chat template drops something; names them by ``where``."""
    dropped: dict[str, dict[int, None]] = {}  # the rows by what is dropped, in order
    for row, length, unshown in zip(*(documents[name][:] for name in ("row", "length", "unshown")), strict=True):
        shown = [f"lose {what}, which the chat template does not show" for what in unshown]
        for what in shown if length else ["have no answer to train on and are left out", *shown]:
            dropped.setdefault(what, {})[row] = None
    for what, rows in dropped.items():
        names = sources.join_names([where[row] for row in itertools.islice(rows, 11)])
        rank_zero_warn(f"data.{key}: {len(rows)} of {among} {what}: {names}")


def _versions() -> list[str]:
    """The versions that rows and tokens depend on: of our own code, and of the libraries that it calls."""
    import datasets

    libraries = [f"{library.__name__} {library.__version__}" for library in (datasets, jinja2, tokenizers, transformers)]
    return libraries + [inspect.getsource(m) for m in (encoding, formats, masking, rendering, sources, sys.modules[__name__])]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
