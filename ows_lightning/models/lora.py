"""LoRA adapters around a causal LM, through peft."""

import inspect
from typing import Any

from torch import nn

from ows_lightning.errors import UsageError, did_you_mean


def add_lora(model: nn.Module, settings: dict[str, Any], **options: Any) -> nn.Module:
    """Puts adapters around a causal LM; a UsageError names the key of peft's LoraConfig that is wrong."""
    config = lora_config(settings)
    from peft import get_peft_model

    try:
        return get_peft_model(model, config, **options)
    except ValueError as error:  # the model has no such modules
        raise UsageError(f"model.lora: {error}") from error


def lora_config(settings: dict[str, Any]) -> Any:
    """Returns peft's LoraConfig, or raises a UsageError that names the wrong key."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError('model.lora: needs peft; pip install "ows_lightning[lora]"') from error
    if not isinstance(rank := settings.get("r", 8), int) or rank < 1:
        raise UsageError(f"model.lora.r: {rank!r} must be a whole number of at least 1")
    if settings.get("alora_invocation_tokens"):
        raise UsageError("model.lora.alora_invocation_tokens: such adapters can't be merged into the model; leave it out")
    known = inspect.signature(LoraConfig).parameters
    for key in [key for key in settings if key not in known]:
        raise UsageError(f"model.lora.{key}: peft's LoraConfig has no such key{did_you_mean(key, known)}")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.lora: {error}; the keys are those of peft's LoraConfig") from error
