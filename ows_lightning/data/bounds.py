"""The ranges of `InstructionDataModule`'s settings. Values that no machine can handle are refused: it would seem to hang."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ows_lightning.data import formats
from ows_lightning.errors import UsageError

if TYPE_CHECKING:
    from ows_lightning.data.datamodule import InstructionDataModule

_BOUNDS = {
    "batch_size": (1, 8192),
    "eval_batch_size": (1, 8192),
    "max_seq_length": (2, 1 << 20),
    "exact_match_rows": (0, 1_000_000),
    "num_workers": (0, 512),
    "seed": (0, 2**32 - 1),
}
_WEIGHTS = (1e-6, 1e6)  # of the sources of a mixture
_FEW_ROWS = 256  # up to this size, a batch may be larger than the data
_MOST_VALIDATION_ROWS = 100_000  # rows of a stream, which are held in memory


def check_settings(data: InstructionDataModule) -> None:
    """Check all settings that can be checked without reading a row.

    Raises:
        UsageError: Names the setting, what it may be, and what it is.
    """
    for name, (least, most) in _BOUNDS.items():
        if not _is_number(value := getattr(data, name), Integral):
            raise UsageError(f"data.{name} must be a whole number, got {value!r}")
        if not least <= value <= most:
            bound = f"least {least}" if value < least else f"most {most}"
            raise UsageError(f"data.{name} must be at {bound}, got {value}")
    if not _is_number(size := data.val_size, Real) or not (0 <= size < 1 or (size >= 1 and _is_number(size, Integral))):
        raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {size}")
    if not data.dataset:
        raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
    least_weight, most_weight = _WEIGHTS
    for source, weight in data.dataset.items() if isinstance(data.dataset, Mapping) else ():
        if not _is_number(weight, Real) or not weight > 0:
            raise UsageError(f"data.dataset: the weight of '{source}' must be above 0, got {weight!r}")
        if not least_weight <= weight <= most_weight:
            raise UsageError(
                f"data.dataset: the weight of '{source}' must be from {least_weight:g} to {most_weight:g}, got {weight!r}"
            )
    if not data.split.strip():
        raise UsageError("data.split is empty; give the name of a split, or leave it out")
    if data.data_format is not None and data.data_format not in formats.FORMATS:
        raise UsageError(f"data.data_format must be one of {', '.join(formats.FORMATS)}, got '{data.data_format}'")
    if unknown := sorted(set(data.columns) - set(formats.COLUMNS)):
        raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
    if data.packing and data.group_by_length:
        raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")
    if data.streaming:
        _check_streaming(data)


def check_batches(data: InstructionDataModule, rows: int) -> None:
    """Refuse batches of many more rows than the data has: the predicted memory would be wrong.

    Raises:
        UsageError: Says how many rows there are.
    """
    if data.batch_size > max(rows, _FEW_ROWS):
        raise UsageError(
            f"data.batch_size: {data.batch_size} is more than the {rows} rows there are; set it to {rows} or less"
        )


def _check_streaming(data: InstructionDataModule) -> None:
    if data.group_by_length:
        raise UsageError("data.group_by_length: the rows of a stream can't be sorted by length; set it to false")
    if data.eval_dataset or not data.val_size:
        return
    if isinstance(data.val_size, float):
        raise UsageError(f"data.val_size: {data.val_size} of a stream is not known; give a number of rows, or 0")
    if isinstance(data.dataset, Mapping):
        raise UsageError(
            "data.val_size: a mixture repeats rows, also those held out of its stream; give an eval_dataset, or 0"
        )
    if data.val_size > _MOST_VALIDATION_ROWS:
        raise UsageError(
            f"data.val_size: {data.val_size} rows of a stream are more than {_MOST_VALIDATION_ROWS}; give an eval_dataset"
        )


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
