"""Fake models: a causal LM's tensors without their memory, built from its config alone."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ows_lightning.errors import UsageError
from ows_lightning.models.pretrained import load_config

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
