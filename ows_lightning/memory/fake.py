"""Fake models: a causal LM's tensors without their memory, built from its config alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ows_lightning.errors import UsageError
from ows_lightning.pretrained import load_config
from ows_lightning.sampling.decoder import causal_lm

SHIPPED = Path(__file__).parent / "models"


def find_config(name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Finds a model's dimensions, without its weights and, where it can, without a network.

    A local directory's ``config.json`` comes first, then the dimensions that this package brings along (for names that begin
    with theirs, such as ``meta-llama/Llama-2-7b-hf``), then whatever `load_config` finds.

    Args:
        name: Hub name, directory, GGUF file or ``package://PACKAGE/FILE.gguf``.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UsageError: There is no such model, or its ``config.json`` can't be read.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        base = name.rsplit("/", 1)[-1].lower()
        shipped = [path for path in SHIPPED.iterdir() if base.startswith(path.name.lower())]
        if not shipped:
            return load_config(name, trust_remote_code)
        directory = max(shipped, key=lambda path: len(path.name))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"model.model_name_or_path: {name!r} has no readable config.json ({error})") from error
    return config


def meta_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None, num_layers: int | None = None
) -> nn.Module:
    """Returns a causal LM on the meta device, in training mode.

    Args:
        config: The model's config; it stays as it is.
        dtype: Dtype of the weights.
        attention: ``sdpa``, ``eager`` or transformers' own choice.
        num_layers: Number of decoder blocks; the config's own by default.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


@contextmanager
def faking() -> Iterator[None]:
    """Operators return fake CPU tensors within it; `materialize_` puts a meta model's weights there."""
    with FakeTensorMode(), _WorstCase():
        yield


def materialize_(model: nn.Module) -> None:
    """Turns a meta model's tensors into fake ones (within `faking`). Shared weights stay shared."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    model._apply(fake)
    causal_lm(model).tie_weights()  # type: ignore[operator]


class _WorstCase(TorchDispatchMode):
    """Answers what depends on values that fake tensors lack: a mask selects everything, a condition holds, a number is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            tensor, (mask,) = args
            return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))
        return func(*args, **(kwargs or {}))
