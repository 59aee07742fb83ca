"""The settings that a resumed run can't change: saved in checkpoints, and checked when one is loaded."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ows_lightning.errors import UsageError, command_line

FIXED_MODEL_KEYS = ("model_name_or_path", "rank", "proj_type", "project_embeddings", "lora")
FIXED_SAMPLING_KEYS = ("activated_layers", "interval_steps", "distribution", "always_train", "grouping", "resting_rank")


def sampling_settings(sampling: object) -> dict[str, Any]:
    """Returns a BlockSampler's settings that can't change, as plain values by their names."""
    return {key: plain(getattr(sampling, key)) for key in FIXED_SAMPLING_KEYS}


def check_fixed_settings(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any], resumes: bool = True, prefix: str = "ckpt_path"
) -> None:
    """Raises a UsageError, with both values, if the fixed settings saved in a checkpoint and those now differ.

    If no training resumes, the model's dimensions and adapters alone have to agree. The error begins with ``prefix``.
    """
    if saved is None and not resumes:  # whether the weights fit is seen when they are loaded
        return
    if saved is None:
        kind = "another program's run, or of a module that overrides on_save_checkpoint without super()"
        raise UsageError(f"ckpt_path: the checkpoint is of {kind}; give one that `{command_line('fit')}` wrote")
    adapters = {"model.lora"} if saved.get("model.lora") and now.get("model.lora") else set()  # else loading refuses them
    keys = sorted(key for key in saved.keys() | now.keys() if resumes or "." not in key or key in adapters)
    if different := [key for key in keys if not _same(key, saved.get(key), now.get(key))]:
        listed = ", ".join(f"{key} ({saved.get(key)!r} in the checkpoint, {now.get(key)!r} now)" for key in different)
        raise UsageError(f"{prefix}: the checkpoint is of a run with other settings: {listed}; set them back, or start anew")


def plain(value: Any) -> Any:
    """Lists for tuples and tensors, text for paths and enums, numbers for NumPy's: what `torch.load` takes as safe."""
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Enum, Path)):
        return getattr(value, "value", str(value))
    return value.tolist() if hasattr(value, "tolist") else value


def _same(key: str, saved: Any, now: Any) -> bool:
    if key == "model.model_name_or_path" and saved and now:
        return Path(saved).name == Path(now).name  # a directory may have been moved
    if key.endswith("resting_rank"):
        return (saved or 0) == (now or 0)  # older runs have none
    if key == "tied embeddings":  # a head of its own would overwrite the embeddings that it is tied to now
        return saved is not False or not now
    return bool(saved == now)
