"""Where in its safetensors files each weight of a model lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from ows_lightning.models.source import locate

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredWeight(NamedTuple):
    """A weight in a file: its name there, first byte, shape, and dtype (None for one that models don't train in)."""

    path: Path
    key: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is of a tensor's shape, and can be mapped."""
        return self.shape == tensor.shape and self.dtype is not None and self.start % self.dtype.itemsize == 0


def stored_weights(name: str) -> dict[str, StoredWeight]:
    """Returns the weights that a model's safetensors hold, by their names there; none for a model in another format.

    Args:
        name: Hub name, directory, GGUF file or ``package://PACKAGE/FILE.gguf``.
    """
    source = locate(name)
    if source.gguf_file is not None:
        return {}
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    files = {"model.safetensors"}
    if index := cached_file(source.path, "model.safetensors.index.json", **options):
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
    paths = [cached_file(source.path, file, **options) for file in sorted(files)]
    return {key: weight for path in paths if path for key, weight in _weights_in(Path(path)).items()}


def _weights_in(path: Path) -> dict[str, StoredWeight]:
    """Reads a file's header: its length in 8 bytes, then JSON; offsets count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        key: StoredWeight(path, key, 8 + length + about["data_offsets"][0], tuple(about["shape"]), _DTYPES.get(about["dtype"]))
        for key, about in header.items()
    }
