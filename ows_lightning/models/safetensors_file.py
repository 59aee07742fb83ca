"""Safetensors files: where each weight of a model is stored, and a file that is written one tensor at a time."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ows_lightning.models.source import locate_model

_DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(_DTYPE_NAMES)}  # that of safetensors' own list, by which it sorts
_FLOAT_DTYPES = {_DTYPE_NAMES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class SafetensorsFile(AbstractContextManager["SafetensorsFile"]):
    """Writes a file, byte for byte as safetensors would, whose tensors come in any order and need not all be in memory."""

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # of names, shapes and dtypes of the layout
        end = 0
        self._places: dict[str, tuple[int, Tensor]] = {}
        for name, tensor in sorted(layout.items(), key=lambda item: (-_DTYPE_ORDER[item[1].dtype], item[0])):
            self._places[name] = end, tensor
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors."""
        place, expected = self._places.pop(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        self._file.seek(self._data + place)
        self._file.write(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._file.close()
        assert kind is not None or not self._places, f"{', '.join(self._places)} not written"


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
    """Returns the weights in a model's safetensors files by their names; none for a model in another format."""
    if (source := locate_model(name)).gguf_file is not None:
        return {}
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    paths = [cached_file(source.path, SAFE_WEIGHTS_NAME, **options)]  # for transformers, it counts before an index
    if paths == [None] and (index := cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, **options)):
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
        paths = [cached_file(source.path, file, **options) for file in sorted(files)]
    return {key: weight for path in paths if path for key, weight in _weights_in(Path(path)).items()}


def _weights_in(path: Path) -> dict[str, StoredWeight]:
    """Reads a file's header: its length in 8 bytes, then JSON; offsets count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = 8 + length
    return {
        key: StoredWeight(path, key, data + about["data_offsets"][0], tuple(about["shape"]), _FLOAT_DTYPES.get(about["dtype"]))
        for key, about in header.items()
    }
