"""The ranges of `InstructionDataModule`'s settings. Values that no machine can handle are refused: it would seem to hang."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from ows_lightning.data import formats
from ows_lightning.errors import UsageError

_BOUNDS = {
    "batch_size": (1, 8192),
    "eval_batch_size": (1, 8192),
    "max_seq_length": (2, 1 << 20),
    "exact_match_rows": (0, 1_000_000),
    "num_workers": (0, 512),
    "seed": (0, 2**32 - 1),
}
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6  # of the sources of a mixture
_FEW_ROWS = 256  # up to this size, a batch may be larger than the data
_MOST_VALIDATION_ROWS = 100_000  # of a stream, which are held in memory


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check all settings, by their names, that can be checked without reading a row.

    Raises:
        UsageError: Names the setting, what it may be, and what it is.
    """
    for name, (least, most) in _BOUNDS.items():
        if not _is_number(value := settings[name], Integral):
            raise UsageError(f"data.{name} must be a whole number, got {value!r}")
        if not least <= value <= most:
            raise UsageError(f"data.{name} must be at {f'least {least}' if value < least else f'most {most}'}, got {value}")
    size, dataset = settings["val_size"], settings["dataset"]
    if not _is_number(size, Real) or not (0 <= size < 1 or (size >= 1 and _is_number(size, Integral))):
        raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {size}")
    for source, weight in dataset.items() if isinstance(dataset, Mapping) else ():
        if not _is_number(weight, Real) or not weight > 0:
            raise UsageError(f"data.dataset: the weight of '{source}' must be above 0, got {weight!r}")
        if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
            limits = f"from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
            raise UsageError(f"data.dataset: the weight of '{source}' must be {limits}, got {weight!r}")
    known = settings["data_format"] is None or settings["data_format"] in formats.FORMATS
    unknown = sorted(set(settings["columns"]) - set(formats.COLUMNS))
    splits_stream = settings["streaming"] and size and not settings["eval_dataset"]
    for wrong, message in (
        (not dataset, "data.dataset names no source; give a file, a directory, a glob or a data set on the hub"),
        (not settings["split"].strip(), "data.split is empty; give the name of a split, or leave it out"),
        (not known, f"data.data_format must be one of {', '.join(formats.FORMATS)}, got '{settings['data_format']}'"),
        (
            unknown,
            f"data.columns: '{''.join(unknown[:1])}' is no column of a format; those are {', '.join(formats.COLUMNS)}",
        ),
        (
            settings["packing"] and settings["group_by_length"],
            "data.group_by_length does nothing for packed rows, which have one length; set one of the two",
        ),
        (
            settings["streaming"] and settings["group_by_length"],
            "data.group_by_length: the rows of a stream can't be sorted by length; set it to false",
        ),
        (
            splits_stream and isinstance(size, float),
            f"data.val_size: {size} of a stream is not known; give a number of rows, or 0",
        ),
        (
            splits_stream and isinstance(dataset, Mapping),
            "data.val_size: a mixture repeats rows, also those held out of its stream; give an eval_dataset, or 0",
        ),
        (
            splits_stream and size > _MOST_VALIDATION_ROWS,
            f"data.val_size: {size} rows of a stream are more than {_MOST_VALIDATION_ROWS}; give an eval_dataset",
        ),
    ):
        if wrong:
            raise UsageError(message)


def check_batch_size(batch_size: int, rows: int) -> None:
    """Refuse batches of many more rows than the data has: the predicted memory would be wrong.

    Raises:
        UsageError: Says how many rows there are.
    """
    if batch_size > max(rows, _FEW_ROWS):
        raise UsageError(f"data.batch_size: {batch_size} is more than the {rows} rows there are; set it to {rows} or less")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
