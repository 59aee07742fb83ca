"""Models whose weights have no memory yet, to be filled from files."""

from __future__ import annotations

import contextlib

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ows_lightning.compat import own_parameters
from ows_lightning.models.pretrained import load_config
from ows_lightning.models.source import locate


def empty_model(
    name: str,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Builds what ``load_model`` would load, with its weights on the meta device and its buffers in memory.

    Its embeddings have rows for ``num_tokens``.
    """
    config = load_config(name, trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
        if num_tokens > next(model.get_input_embeddings().parameters()).size(0):
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
    model.tie_weights()  # accelerate makes a parameter of its own for every place
    with contextlib.suppress(OSError):  # it has none of its own
        model.generation_config = GenerationConfig.from_pretrained(locate(name).path)
    return model.train()


def allocate(model: nn.Module) -> nn.Module:
    """Gives the weights of an ``empty_model`` memory, without values, in place; tied ones stay tied."""
    made: dict[nn.Parameter | None, nn.Parameter] = {
        weight: nn.Parameter(torch.empty_like(weight, device="cpu"), requires_grad=weight.requires_grad)
        for weight in model.parameters()
        if weight.is_meta
    }
    for module in model.modules():
        own = own_parameters(module)
        own.update({name: made.get(weight, weight) for name, weight in own.items()})
    return model
