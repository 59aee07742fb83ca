"""Fused kernels in a model's blocks, through liger-kernel."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ows_lightning.errors import UsageError

_FUSED = {"rms_norm", "swiglu", "geglu", "rope"}
Kernels = Literal["liger"]


def liger_for(config: PretrainedConfig) -> Callable[..., None]:
    """Returns liger-kernel's function that patches models of a config's architecture, or raises a UsageError without one."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UsageError('model.kernels: needs liger-kernel; pip install "ows_lightning[liger]"') from error
    put: Callable[..., None] | None = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if put is None or not _FUSED & inspect.signature(put).parameters.keys():
        raise UsageError(f"model.kernels: liger-kernel has none for {config.model_type}; set it to null")
    if not torch.accelerator.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError("model.kernels: liger-kernel's kernels need a GPU; set it to null")
    return put


def fuse_(model: PreTrainedModel, kernels: Kernels | None) -> None:
    """Replaces a model's RMSNorm, SwiGLU or GeGLU, and RoPE by fused kernels, if any; its loss and its weights stay.

    RoPE is a function of the architecture: its other models in this process compute it so from then on, too.
    """
    if kernels is None:
        return
    put = liger_for(model.config)
    flags = [name for name, p in inspect.signature(put).parameters.items() if isinstance(p.default, bool)]
    architecture: dict[str, Any] = vars(sys.modules[type(model).__module__])
    classes = {name: value for name, value in architecture.items() if isinstance(value, type)}
    put(model=model, **{name: name in _FUSED for name in flags})
    architecture.update(classes)  # of which models are made later
