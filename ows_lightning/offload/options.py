"""A run's settings for offloading: what they ask for, and what they refuse."""

from collections.abc import Mapping
from typing import Any

from ows_lightning.errors import UsageError


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether a module's settings have its frozen blocks offloaded."""
    return settings["frozen_in"] != "device" or settings["frozen_dtype"] is not None


def check_offloading(model: Mapping[str, Any], trains_unsampled: bool, devices: int, strategy: str) -> None:
    """Refuses, by a UsageError, to offload where no block is frozen, or whose weights several devices share."""
    if not offloads(model):
        return
    frozen_in, frozen_dtype = model["frozen_in"], model["frozen_dtype"]
    key = f"model.frozen_in: {frozen_in}" if frozen_in != "device" else f"model.frozen_dtype: {frozen_dtype}"
    resident = "model.frozen_in: device" + (" without model.frozen_dtype" if frozen_dtype else "")
    if devices > 1 or strategy == "fsdp2":
        what = "trainer.strategy: fsdp2" if strategy == "fsdp2" else f"trainer.devices: {devices}"
        hint = f"set trainer.devices: 1 and trainer.strategy: auto, or {resident} to share the weights among devices by fsdp2"
        raise UsageError(f"{key} is for one device, and {what} is set; {hint}")
    if trains_unsampled and model["lora"] is None:
        hint = f"sample blocks (`sampling`), or set model.lora or {resident}"
        raise UsageError(f"{key} needs frozen blocks, and full fine-tuning trains all of them; {hint}")
