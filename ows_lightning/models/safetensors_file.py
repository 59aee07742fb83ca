"""A safetensors file that is written one tensor at a time: `safetensors.torch.save_file` wants all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}  # that of safetensors' own list, by which it sorts


class SafetensorsFile:
    """Writes a file, byte for byte as safetensors would: its header at once, then tensors in any order.

    Args:
        path: The file.
        layout: The tensors that will be written; only their names, shapes and dtypes count.
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        self._places: dict[str, tuple[int, Tensor]] = {}
        for name, tensor in sorted(layout.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0])):
            self._places[name] = end, tensor
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
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

    def __enter__(self) -> SafetensorsFile:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the file."""
        self._file.close()
        assert kind is not None or not self._places, f"{', '.join(self._places)} not written"
