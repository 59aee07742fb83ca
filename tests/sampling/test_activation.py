"""Freezing and unfreezing."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Zamba2Config, Zamba2ForCausalLM

from ows_lightning.models.decoder import decoder_layers
from ows_lightning.sampling.activation import activate_blocks, non_block_trains, trainable_by_block
from tests.tiny import tiny_batch, tiny_model


def test_a_block_that_several_others_share_trains_if_one_of_them_is_active() -> None:
    config = Zamba2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8, mamba_headdim=16,
        n_mamba_heads=4, use_mem_rope=False, adapter_rank=4, attention_head_dim=16, kv_channels=16,
    )  # fmt: skip
    model = Zamba2ForCausalLM(config).train()
    layers = decoder_layers(model)
    shared = {p for p in layers[1].parameters() if any(p is q for q in layers[3].parameters())}
    assert shared
    optimizer = torch.optim.AdamW(model.parameters())
    for active in ([1], [3], [1, 4], [0, 5]):
        activate_blocks(trainable_by_block(model) if active == [1] else layers, active, optimizers=[optimizer])
        assert all(p.grad is None for p in layers.parameters() if not p.requires_grad)
        model(**tiny_batch(length=8)).loss.backward()
        trained = {p for index in active for p in layers[index].parameters()}
        assert {p for p in layers.parameters() if p.requires_grad} == trained
        assert shared <= trained
    activate_blocks(layers, [0])
    assert not any(p.requires_grad for p in shared)


def test_what_was_frozen_before_and_what_is_not_of_the_language_model() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    others = non_block_trains(model, ["lm_head", "norm"])
    assert others == {model.model.embed_tokens.weight: False, model.lm_head.weight: True}
    assert [len(block) for block in trainable_by_block(model)] == [8, 9, 9, 9]


def test_a_block_without_parameters_costs_nothing() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
    activate_blocks(layers, [1])
    assert not any(p.requires_grad for p in layers.parameters())


def test_matrices_with_no_more_inputs_than_the_rank_stay_frozen_at_rest() -> None:
    layers = decoder_layers(tiny_model("llama"))
    activate_blocks(layers, [1], resting_rank=32)
    rests = [{name for name, p in layer.named_parameters() if p.requires_grad} for layer in layers]
    assert rests[0] == set()
    assert rests[2] == rests[3] == {"mlp.down_proj.weight"}  # of 64 inputs
