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
_MOST_VALIDATION_ROWS = 100_000  # rows of a stream, which are held in memory


def check_bounds(settings: Mapping[str, Any]) -> None:
    """Checks all settings that can be checked without reading a row.

    Args:
        settings: The data module's attributes, by name.

    Raises:
        UsageError: Names the setting, what it may be, and what it is.
    """
    for name, (least, most) in _BOUNDS.items():
        if not _is_number(value := settings[name], Integral):
            raise UsageError(f"data.{name} must be a whole number, got {value!r}")
        if not least <= value <= most:
            bound = f"least {least}" if value < least else f"most {most}"
            raise UsageError(f"data.{name} must be at {bound}, got {value}")
    size, sources, columns = settings["val_size"], settings["dataset"], settings["columns"]
    if not _is_number(size, Real) or not (0 <= size < 1 or (size >= 1 and _is_number(size, Integral))):
        raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {size}")
    if not sources:
        raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
    for source, weight in sources.items() if isinstance(sources, Mapping) else ():
        if not _is_number(weight, Real) or not weight > 0:
            raise UsageError(f"data.dataset: the weight of '{source}' must be above 0, got {weight!r}")
        if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
            allowed = f"from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
            raise UsageError(f"data.dataset: the weight of '{source}' must be {allowed}, got {weight!r}")
    if not settings["split"].strip():
        raise UsageError("data.split is empty; give the name of a split, or leave it out")
    if (name := settings["data_format"]) is not None and name not in formats.FORMATS:
        raise UsageError(f"data.data_format must be one of {', '.join(formats.FORMATS)}, got '{name}'")
    if unknown := sorted(set(columns) - set(formats.COLUMNS)):
        raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
    if settings["packing"] and settings["group_by_length"]:
        raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")
    if settings["streaming"]:
        _check_streaming(settings)


def _check_streaming(settings: Mapping[str, Any]) -> None:
    if settings["group_by_length"]:
        raise UsageError("data.group_by_length: the rows of a stream can't be sorted by length; set it to false")
    size = settings["val_size"]
    if settings["eval_dataset"] or not size:
        return
    if isinstance(size, float):
        raise UsageError(f"data.val_size: {size} of a stream is not known; give a number of rows, or 0")
    if isinstance(settings["dataset"], Mapping):
        mend = "give an eval_dataset, or 0"
        raise UsageError(f"data.val_size: a mixture repeats rows, also those for validation; {mend}")
    if size > _MOST_VALIDATION_ROWS:
        most = f"more than {_MOST_VALIDATION_ROWS}"
        raise UsageError(f"data.val_size: {size} rows of a stream are {most}; give an eval_dataset")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
