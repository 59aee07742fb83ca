"""What a run needs for frozen blocks to wait outside the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ows_lightning.errors import UsageError


def check_window_blocks(window_blocks: int) -> None:
    """Checks a window's size.

    Raises:
        UsageError: It is too small or too large.
    """
    if window_blocks not in (2, 3):
        raise UsageError(
            f"model.window_blocks: {window_blocks} must be 2 or 3: one block computes while the next one comes, "
            "and more than 3 gain nothing"
        )


def check_offloading(model: Mapping[str, Any], some_are_frozen: bool, devices: int, strategy: str) -> None:
    """Refuses runs in which no block is frozen, or whose weights several devices share.

    Args:
        model: The module's settings, of which ``frozen_in`` and ``frozen_dtype`` count.
        some_are_frozen: Whether blocks are sampled, or below adapters.
        devices: Number of devices.
        strategy: Name of the strategy.

    Raises:
        UsageError: With what to use instead.
    """
    frozen_in, frozen_dtype = model["frozen_in"], model["frozen_dtype"]
    if frozen_in == "device" and frozen_dtype is None:
        return
    key = f"model.frozen_in: {frozen_in}" if frozen_in != "device" else f"model.frozen_dtype: {frozen_dtype}"
    resident = "model.frozen_in: device" if frozen_dtype is None else "model.frozen_in: device without model.frozen_dtype"
    if devices > 1 or strategy == "fsdp2":
        what = "trainer.strategy: fsdp2" if strategy == "fsdp2" else f"trainer.devices: {devices}"
        raise UsageError(
            f"{key} is for one device, and {what} is set; set trainer.devices: 1 and trainer.strategy: "
            f"auto, or {resident} to share the weights among devices by fsdp2"
        )
    if not some_are_frozen:
        raise UsageError(
            f"{key} needs frozen blocks, and full fine-tuning trains all of them; sample blocks "
            f"(`sampling`), or set model.lora or {resident}"
        )
