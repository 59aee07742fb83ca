"""How a model's blocks run: which recompute their activations in backward, compiled or not, and with which kernels."""

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ows_lightning.compat import allow_recompilation, drop_input_gradients, keep_recomputation_out_of_inference_graphs
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers

# All blocks, none, or the first N; ``auto`` is all until a prediction of the memory has said how many.
GradientCheckpointing = bool | int | Literal["auto"]
_FUSED = {"rms_norm", "swiglu", "geglu", "rope"}
Kernels = Literal["liger"]


def check_gradient_checkpointing(setting: GradientCheckpointing) -> None:
    """Raises a UsageError if the value is not one of the possible settings."""
    if setting != "auto" and not (isinstance(setting, int) and setting >= 0):
        raise UsageError(f"model.gradient_checkpointing: {setting} must be true, false, auto, or a number of blocks from 0 on")


def num_to_checkpoint(setting: GradientCheckpointing, num_layers: int) -> int:
    """Returns how many of a model's blocks recompute their activations by a setting."""
    return num_layers if setting is True or setting == "auto" else min(int(setting), num_layers)


def count_checkpointed(model: nn.Module) -> int:
    """Returns how many blocks of a model, or of peft's around one, recompute their activations at present."""
    whole = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return sum(getattr(layer, "gradient_checkpointing", whole) for layer in decoder_layers(model))


def checkpoint_activations(model: PreTrainedModel, setting: GradientCheckpointing = True) -> None:
    """Turns on activation checkpointing for the first blocks; frozen blocks below the active ones are never recomputed.

    Backward reaches the first blocks last, when the activations of all others are freed already. It may be called again with
    another number. A UsageError says that the model's class can't recompute, or not some of its blocks alone.
    """
    layers = decoder_layers(model)
    if number := num_to_checkpoint(setting, len(layers)):
        if not model.supports_gradient_checkpointing:
            raise UsageError(f"model.gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the old name
        enable({"use_reentrant": False})
        drop_input_gradients(model)  # else frozen blocks below the active ones are recomputed
    if 0 < number < len(layers) and not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        name = type(model).__name__
        raise UsageError(f"model.gradient_checkpointing: {name} recomputes all blocks or none; set it to true or false")
    for part in layers[number:] if number else [model]:
        for module in part.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles each decoder block with ``torch.compile``."""
    # The blocks share their cases: frozen or not, with a gradient from below or not, lengths that are fixed or change.
    allow_recompilation(32)
    keep_recomputation_out_of_inference_graphs()
    for layer in decoder_layers(model):
        layer.compile()


def liger_for(config: PretrainedConfig) -> Callable[..., None]:
    """Returns liger-kernel's function that patches models of a config's architecture, or raises a UsageError without one."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UsageError('model.kernels: needs liger-kernel; pip install "ows_lightning[liger]"') from error
    apply_kernels: Callable[..., None] | None = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if apply_kernels is None or not _FUSED & inspect.signature(apply_kernels).parameters.keys():
        raise UsageError(f"model.kernels: liger-kernel has none for {config.model_type}; set it to null")
    if not torch.accelerator.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("model.kernels: liger-kernel's kernels need a GPU; set it to null")
    return apply_kernels


def apply_liger_kernels_(model: PreTrainedModel) -> None:
    """Replaces a model's RMSNorm, SwiGLU or GeGLU, and RoPE by fused kernels; its loss and its weights stay.

    RoPE is a function of the architecture: its other models in this process compute it so from then on, too.
    """
    apply_kernels = liger_for(model.config)
    flags = [name for name, p in inspect.signature(apply_kernels).parameters.items() if isinstance(p.default, bool)]
    architecture: dict[str, Any] = vars(sys.modules[type(model).__module__])
    before = dict(architecture)
    apply_kernels(model=model, **{name: name in _FUSED for name in flags})
    for name, plain in before.items():
        if isinstance(plain, type):  # of which models are made later
            architecture[name] = plain
        elif (fused := architecture[name]) is not plain:  # a kernel would read the memory that fake tensors don't have
            architecture[name] = partial(_with_contents, plain, fused)


def _with_contents(plain: Callable[..., Any], fused: Callable[..., Any], first: Any, *args: Any, **kwargs: Any) -> Any:
    return (fused if type(first) is Tensor else plain)(first, *args, **kwargs)
