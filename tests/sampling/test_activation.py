"""Freezing and unfreezing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Zamba2Config, Zamba2ForCausalLM

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.optim import GaLoreAdamW, galore_param_groups
from ows_lightning.optim.subspace import random_subspace
from ows_lightning.sampling.activation import activate_blocks, non_block_trains, trainable_by_block
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.sampler import BlockSampler
from ows_lightning.sampling.scores import BlockScores
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


@pytest.mark.parametrize("named", ["embeddings", "lm_head"])
def test_a_tied_weight_trains_if_either_of_its_parts_does(named: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    others = [(p, part == named) for part, ps in non_block_parameters(model).items() for p in ps]
    activate_blocks(decoder_layers(model), [1], others)
    assert model.get_input_embeddings().weight.requires_grad


def test_accelerates_wrapper_rests_as_the_optimizer_within() -> None:
    changes = []
    for wrap in (lambda optimizer: optimizer, Accelerator(cpu=True).prepare):
        model = tiny_model("llama")
        optimizer = GaLoreAdamW(galore_param_groups(model, rank=8), lr=1e-2)
        given = wrap(optimizer)
        activate_blocks(decoder_layers(model), [1], [], [given], resting_rank=3, resting_seed=5)
        weight = decoder_layers(model)[2].self_attn.q_proj.weight
        before = weight.detach().clone()
        model(**tiny_batch()).loss.backward()
        given.step()
        changes.append(weight.detach() - before)
        assert optimizer.is_resting(weight)
    assert torch.equal(*changes)
    assert torch.linalg.matrix_rank(changes[0]) == 3


def test_no_block_rests_with_an_optimizer_that_would_train_it_in_full() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"^resting_rank: AdamW can't train blocks at rest; take GaLoreAdamW, or 0"):
        activate_blocks(decoder_layers(model), [1], [], [torch.optim.AdamW(model.parameters())], resting_rank=3)


class AlwaysTheSame(BlockSampler):
    def blocks_of(self, interval: int) -> list[int]:
        return [1]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_sampler_ends_the_rest_of_its_own_models_blocks_alone(rank: int) -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    optimizer = GaLoreAdamW([*galore_param_groups(one, rank=8), *galore_param_groups(other, rank=8)], lr=1e-2)
    for model, resting_rank in ((one, 3), (other, rank)):
        sampler = AlwaysTheSame(1, 2, "uniform", always_train=(), resting_rank=resting_rank)
        sampler.attach(model)
        sampler.start(0, [optimizer], partial(sampler.compute_scores, model, None))
    rests = [optimizer.is_resting(decoder_layers(model)[2].mlp.up_proj.weight) for model in (one, other)]
    assert rests == [True, rank > 0]
    optimizer.rest([])
    assert not any(map(optimizer.is_resting, optimizer.state))


def test_experts_biases_are_biases() -> None:
    """They have two dimensions, as matrices have, but no decay, no subspace and no rest."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("gpt_oss", **small, **heads, num_local_experts=8, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-2, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert {p.dim() for p in biases.values()} == {1, 2}
    assert {decay[name] for name in biases} == {0.0}
    assert not any(optimizer._projected_side(p) for p in biases.values())
    activate_blocks(trainable_by_block(model), [0], [], [optimizer], resting_rank=3)
    rests = [name for name, p in decoder_layers(model)[1].named_parameters() if p.requires_grad]
    assert "mlp.experts.gate_up_proj" in rests
    assert not any(name.endswith("bias") for name in rests)


def test_draws_and_subspaces_do_not_depend_on_torchs_default_device() -> None:
    def draw() -> tuple[list[list[int]], torch.Tensor]:
        grouped, decreasing = (AnyDraws(2, 4, d, grouping=g) for d, g in (("uniform", 1.0), ("decreasing", 0.0)))
        return [grouped.draw(), decreasing.draw()], random_subspace(weight, 3, seed=5)

    weight = torch.empty(8, 6)
    (blocks, basis) = draw()
    with torch.device("meta"):  # as "cuda", for which a generator on the CPU gives no numbers
        there, same = draw()
    assert there == blocks
    assert torch.equal(same, basis)


class AnyDraws(BlockSampler):
    def draw(self) -> list[int]:
        scores = BlockScores("", 6, 13.0, 0, self.distribution, [1.0] * 6, [1 / 6] * 6)
        self.outlier_scores, self.probabilities = scores, sampling_probabilities(scores.outlier_ratios, self.distribution)
        return self.blocks_of(3)
