"""How a model's blocks run: which recompute their activations in backward, and whether they are compiled."""

from __future__ import annotations

from typing import Literal

import transformers
from torch import nn
from transformers import PreTrainedModel

from ows_lightning.compat import allow_recompilation, keep_recomputation_out_of_inference_graphs
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers

# All blocks, none, or the first N; ``auto`` is all until a prediction of the memory has said how many.
Recomputation = bool | int | Literal["auto"]


def check_recomputation(setting: Recomputation) -> None:
    """Raises a UsageError if the value is not one of the possible settings."""
    if setting != "auto" and not (isinstance(setting, int) and setting >= 0):
        raise UsageError(f"model.gradient_checkpointing: {setting} must be true, false, auto, or a number of blocks from 0 on")


def recomputed_blocks(setting: Recomputation, count: int) -> int:
    """Returns how many of a model's blocks a setting lets recompute."""
    return count if setting is True or setting == "auto" else min(int(setting), count)


def recomputing_blocks(model: nn.Module) -> int:
    """Returns how many blocks of a model, or of peft's around one, recompute their activations as it is."""
    whole = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return sum(getattr(layer, "gradient_checkpointing", whole) for layer in decoder_layers(model))


def checkpoint_activations(model: PreTrainedModel, setting: Recomputation = True) -> None:
    """Turns on activation checkpointing of the first blocks; frozen blocks below the active ones are not recomputed.

    The first ones, for these are the last that backward comes to: what the others kept is gone by then. And where the lowest
    active block is a high one, few or none of them recompute. It may be called again, with another number. A UsageError says
    that the model's class can't, or not for some blocks alone.
    """
    layers = decoder_layers(model)
    if number := recomputed_blocks(setting, len(layers)):
        _enable_checkpointing(model)
    if 0 < number < len(layers) and not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        name = type(model).__name__
        raise UsageError(f"model.gradient_checkpointing: {name} recomputes all blocks or none; set it to true or false")
    for part in layers[number:] if number else [model]:
        for module in part.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]


def _enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        name = f"{type(model).__name__} has none in transformers {transformers.__version__}"
        raise UsageError(f"model.gradient_checkpointing: {name}; set it to false")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the old name
    enable({"use_reentrant": False})
    # Otherwise the embeddings' output requires a gradient, and frozen blocks below the active ones are recomputed.
    model.disable_input_require_grads()


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles each decoder block with ``torch.compile``."""
    # The blocks share their cases: frozen or not, with a gradient from below or not, lengths that are fixed or change.
    allow_recompilation(32)
    keep_recomputation_out_of_inference_graphs()
    for layer in decoder_layers(model):
        layer.compile()
