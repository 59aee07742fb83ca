"""The longest row of a model whose positions are a table of limited length."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ows_lightning.models.pretrained import loading_errors

_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")


def exceeded_positions(config: PretrainedConfig, length: int, trust_remote_code: bool = False) -> int | None:
    """The most tokens that the model has positions for, where `length` tokens are more; else None.

    A config's ``max_position_embeddings`` is no limit by itself: rotary models compute further positions. So a model without
    memory is made from the config, and asked for tables of this length: embeddings (GPT-2, OPT), or tensors of sines
    (GPT-J, CTRL). MPT builds its biases for this length without a table.
    """
    config = config.get_text_config()
    named = {value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int)}
    in_front = 1 + (getattr(config, "pad_token_id", None) or 0)  # positions that RoBERTa's kin count off
    if not named or length + in_front <= min(named):
        return None
    small = copy.deepcopy(config)
    if not getattr(config, "layer_types", None):
        small.num_hidden_layers = 1
    with torch.device("meta"), loading_errors(str(config.name_or_path)):
        model = AutoModelForCausalLM.from_config(small, trust_remote_code=trust_remote_code)
    limits = {config.max_seq_len} if config.model_type == "mpt" else set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            rows = module.num_embeddings - int(getattr(module, "offset", 0))
            limits |= {rows - (0 if module.padding_idx is None else module.padding_idx + 1)} if rows in named else set()
        for tensor in [*module.buffers(recurse=False), *(value for value in vars(module).values() if torch.is_tensor(value))]:
            limits |= {tensor.shape[0]} if tensor.dim() == 2 and tensor.shape[0] in named else set()
    limit = min(limits, default=length)
    return limit if length > limit else None
