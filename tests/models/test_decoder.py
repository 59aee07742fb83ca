from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from tests.tiny import ARCHITECTURES, tiny_batch, tiny_model


class Wrapper(LightningModule):
    """A module of somebody else's, with a larger list of modules beside the language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.probes = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))
        self.model = model


def tiny_llava() -> LlavaForConditionalGeneration:
    """A vision-language model whose vision tower has more blocks, and larger ones, than its language model."""
    sizes = {"intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(hidden_size=64, num_hidden_layers=6, image_size=32, patch_size=16, **sizes)
    text = LlamaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=128, num_key_value_heads=2, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=127))


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finds_the_blocks_that_run_in_a_forward_pass(architecture: str, num_layers: int) -> None:
    model = tiny_model(architecture, num_hidden_layers=num_layers)
    layers = decoder_layers(model)
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model(input_ids=tiny_batch()["input_ids"])
    assert ran == list(range(num_layers))
    # Embeddings, head and final norm aside, the blocks are all there is.
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in layers.parameters())
    non_blocks = {id(p): p.numel() for group in non_block_parameters(model).values() for p in group}
    assert outside == sum(non_blocks.values())


def test_finds_the_blocks_inside_other_modules() -> None:
    model = tiny_model("llama")
    assert decoder_layers(Wrapper(model)) is model.model.layers
    lora = get_peft_model(tiny_model("gpt2"), LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    assert decoder_layers(Wrapper(lora)) is lora.base_model.model.transformer.h


def test_adapters_of_embeddings_belong_to_them() -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(tiny_model("llama"), lora)
    adapters = {p for name, p in model.named_parameters() if "lora_embedding" in name}
    groups = non_block_parameters(model)
    assert adapters
    assert adapters <= set(groups["embeddings"])
    assert adapters.isdisjoint(groups["norm"])


def test_finds_the_blocks_of_a_model_that_is_not_from_transformers() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert decoder_layers(model) is model["blocks"]


@pytest.mark.parametrize("holder", [nn.Sequential, lambda *blocks: nn.ModuleDict({str(i): b for i, b in enumerate(blocks)})])
def test_experts_of_blocks_in_a_sequence_are_not_taken_for_blocks(holder: Any) -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    with pytest.raises(UsageError, match="has no decoder blocks"):
        decoder_layers(nn.ModuleDict({"embed": nn.Embedding(8, 4), "blocks": holder(block(), block())}))
    one = nn.Sequential(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])}))
    assert decoder_layers(one) is one[0]["blocks"]


def test_vision_language_model_gives_its_language_blocks() -> None:
    model = tiny_llava()
    assert decoder_layers(model) is model.model.language_model.layers
    groups = non_block_parameters(model)
    other = {id(p) for p in groups["other"]}
    assert {id(p) for p in model.model.vision_tower.parameters()} < other
    assert {id(p) for p in model.model.multi_modal_projector.parameters()} < other
    assert [p is model.model.language_model.norm.weight for p in groups["norm"]] == [True]
    assert [p is model.model.language_model.embed_tokens.weight for p in groups["embeddings"]] == [True]


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict({"blocks": nn.ModuleList()})])
def test_a_model_without_blocks_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        UsageError, match=r"^model: \w+ has no decoder blocks .*; put its blocks into one, or give a decoder-only transformer$"
    ):
        decoder_layers(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_outside_the_blocks_has_its_place(architecture: str) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)
    groups = non_block_parameters(model)
    assert list(groups) == ["embeddings", "lm_head", "norm", "other"]
    assert any(p is model.get_input_embeddings().weight for p in groups["embeddings"])
    assert any(p is model.get_output_embeddings().weight for p in groups["lm_head"])
    assert groups["norm"]
    assert all(p.dim() == 1 for p in groups["norm"])
    assert groups["other"] == []
    found = [id(p) for group in groups.values() for p in group]
    blocks = {id(p) for p in decoder_layers(model).parameters()}
    assert sorted(found) == sorted(id(p) for p in model.parameters() if id(p) not in blocks)


def test_position_embeddings_are_embeddings() -> None:
    model = tiny_model("gpt2")
    assert any(p is model.transformer.wpe.weight for p in non_block_parameters(model)["embeddings"])


def test_a_tied_head_is_under_both_keys() -> None:
    groups = non_block_parameters(tiny_model("llama", tie_word_embeddings=True))
    assert len(groups["embeddings"]) == len(groups["lm_head"]) == 1
    assert groups["embeddings"][0] is groups["lm_head"][0]
    assert torch.is_tensor(groups["norm"][0])
    assert len(groups["norm"]) == 1


def test_parameters_of_a_wrapper_are_not_taken_for_norms() -> None:
    wrapper = Wrapper(tiny_model("llama"))
    assert {id(p) for p in wrapper.probes.parameters()} == {id(p) for p in non_block_parameters(wrapper)["other"]}
