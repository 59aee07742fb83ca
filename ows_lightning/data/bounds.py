"""The ranges of `InstructionDataModule`'s settings. Values that no machine can handle are refused: it would seem to hang."""

from __future__ import annotations

from collections.abc import Mapping
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
_WEIGHTS = (1e-6, 1e6)  # of the sources of a mixture


def check_bounds(settings: Mapping[str, Any]) -> None:
    """Raises a UsageError for the first of the data module's settings, by name, that is wrong without a look at the rows."""
    for name, (least, most) in _BOUNDS.items():
        if not least <= (value := settings[name]) <= most:
            bound = f"least {least}" if value < least else f"most {most}"
            raise UsageError(f"data.{name} must be at {bound}, got {value}")
    size, sources = settings["val_size"], settings["dataset"]
    if not (0 <= size < 1 or (size >= 1 and isinstance(size, int))):
        raise UsageError(f"data.val_size must be a fraction below 1 or a number of rows, got {size}")
    if not sources:
        raise UsageError("data.dataset names no source; give a file, a directory, a glob or a data set on the hub")
    for source, weight in sources.items() if isinstance(sources, Mapping) else ():
        if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
            allowed = "from {:g} to {:g}".format(*_WEIGHTS)
            raise UsageError(f"data.dataset: the weight of '{source}' must be {allowed}, got {weight!r}")
    if unknown := sorted(set(settings["columns"]) - set(formats.COLUMNS)):
        raise UsageError(f"data.columns: '{unknown[0]}' is no column of a format; those are {', '.join(formats.COLUMNS)}")
    if settings["packing"] and settings["group_by_length"]:
        raise UsageError("data.group_by_length does nothing for packed rows, which have one length; set one of the two")
    if settings["streaming"] and settings["group_by_length"]:
        raise UsageError("data.group_by_length: the rows of a stream can't be sorted by length; set it to false")
    if settings["streaming"] and size and not settings["eval_dataset"]:
        if isinstance(size, float):
            raise UsageError(f"data.val_size: {size} of a stream is not known; give a number of rows, or 0")
        if isinstance(sources, Mapping):
            mend = "give an eval_dataset, or 0"
            raise UsageError(f"data.val_size: a mixture repeats rows, also those for validation; {mend}")
