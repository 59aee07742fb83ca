"""Tiny random models of every architecture that the package promises to handle, for the tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# transformers' model type -> what its config needs beside _COMMON; None drops a key that the config does not know.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {},
    "gpt2": {"intermediate_size": None, "n_inner": 64, "num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"intermediate_size": None, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": None},
    "bloom": {"intermediate_size": None, "num_key_value_heads": None, "max_position_embeddings": None},
    "falcon": {"intermediate_size": None, "ffn_hidden_size": 64, "num_key_value_heads": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "stablelm": {},
    "qwen2_moe": {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_QWEN_EXPERTS, "head_dim": 8},
}
ARCHITECTURES = list(_ARCHITECTURES)
"""Every architecture that `tiny_model` builds, by transformers' model type."""
KINDS = ["llama", "gpt2", "falcon", "gemma2", "qwen3_moe"]
"""One of each kind: plain blocks, Conv1D and tied embeddings, fused attention, norms around each part, stacks of experts.

All of transformers' model types are in `tests/models/test_architectures.py`.
"""


def tiny_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Builds a causal LM with random weights, in training mode (4 blocks, hidden size 32, vocabulary 128).

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Seed of the weights; the global random state is left alone.
        dtype: Data type of the weights.
        **overrides: Config values, e.g. `num_hidden_layers=1`, `tie_word_embeddings=True`.
    """
    values = {key: value for key, value in {**_COMMON, **_ARCHITECTURES[architecture]}.items() if value is not None}
    config = AutoConfig.for_model(architecture, **{**values, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def tiny_batch(rows: int = 3, length: int = 16, seed: int = 0, vocab_size: int = 128) -> dict[str, torch.Tensor]:
    """A batch of random tokens without padding: int64 `input_ids`, `labels`, `attention_mask`, each (rows, length)."""
    input_ids = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": input_ids, "labels": input_ids.clone(), "attention_mask": torch.ones_like(input_ids)}
