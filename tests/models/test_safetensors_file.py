"""Files that are written one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ows_lightning.models.safetensors_file import SafetensorsFile


def test_equal_those_of_safetensors_in_whichever_order_they_are_written(tmp_path: Path) -> None:
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
    dtypes += (torch.int32, torch.float32, torch.float64, torch.int64)
    tensors = {f"layers.{i}.weight": torch.arange(15).reshape(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {f"layers.{i}.größe": torch.full((i % 3,), i / 7) for i in range(12)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "ours", tensors) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
