"""Offloaded blocks that train at rest, in a plain loop: what they learned counts wherever it is read, and is added once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.pretrained import load_tokenizer
from ows_lightning.offload import offloader as offloader_module
from ows_lightning.offload.disk import Disk, load_mapped_model
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import activate_blocks
from tests.models.architectures import tiny_config
from tests.models.architectures import tiny_model as model_of
from tests.tiny import tiny_batch, tiny_model


class Loop:
    """A model, its optimizer, and an offloader unless ``frozen_in`` is "device"; one block trains, those above it rest."""

    def __init__(self, model: nn.Module, frozen_in: str = "host", disk: Disk | None = None) -> None:
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        self.model, self.layers = model, decoder_layers(model)
        self.optimizer = GaLoreAdamW(galore_param_groups(model, rank=4), lr=1e-2)
        self.optimizer.project_in_backward(model=model)
        self.offloader = BlockOffloader(self.layers, disk=disk) if frozen_in != "device" else None
        if self.offloader is not None:
            self.offloader.attach_optimizer(self.optimizer)

    def draw(self, block: int, seed: int = 7) -> None:
        activate_blocks(self.layers, [block], [], [self.optimizer], 3, seed)
        if self.offloader is not None:
            self.offloader.apply_draw([self.optimizer])

    def train(self, steps: int) -> None:
        for seed in range(steps):
            self.model(**tiny_batch(2, 8, seed), use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.model(**tiny_batch(2, 8, 99), use_cache=False).loss)


READ_ELSEWHERE: dict[str, dict[str, Any]] = {
    "mamba": {"time_step_rank": 8},
    "bloom": {"pretraining_tp": 2, "slow_but_exact": True},
    "longcat_flash": {"_experts_implementation": "eager"},  # grouped_mm has no kernel for float64
}
"""Architectures in which a block reads the weight of a linear layer itself, and settings with which it can rest."""


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((each, torch.float64) for each in READ_ELSEWHERE), ("mamba", torch.bfloat16)]
)
def test_a_weight_that_a_block_reads_itself_has_what_it_learned(architecture: str, dtype: torch.dtype) -> None:
    config = tiny_config(architecture)
    config.update(READ_ELSEWHERE[architecture])
    trained: list[nn.Module] = []
    for place in ("device", "host"):
        loop = Loop(model_of(config).to(dtype).train(), place)
        loop.draw(0)
        loop.train(3)
        at_rest = loop.loss()
        if loop.offloader is not None:
            loop.offloader.merge_updates()
        assert loop.loss() == pytest.approx(at_rest, abs=1e-9 if dtype == torch.float64 else 0.02)
        trained.append(loop.model)
    if dtype == torch.float64:
        for ours, theirs in zip(*(model.parameters() for model in trained), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)  # steps are of 1e-2


def test_two_layers_that_share_a_weight_learn_as_on_the_device() -> None:
    losses = []
    for place in ("device", "host"):
        model = tiny_model("llama")
        for layer in decoder_layers(model):
            layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
        loop = Loop(model, place)
        loop.draw(0)
        loop.train(3)
        losses.append(loop.loss())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("first", ["optimizer", "model"])
def test_a_copy_has_what_was_learned_whatever_is_copied_first(first: str) -> None:
    loop = Loop(tiny_model("llama"))
    loop.draw(0)
    loop.train(4)
    expected, parts = loop.loss(), ("optimizer", "model") if first == "optimizer" else ("model", "optimizer")
    copied = copy.copy(loop)
    for name, part in zip(parts, copy.deepcopy([getattr(loop, name) for name in parts]), strict=True):
        setattr(copied, name, part)
    assert copied.loss() == loop.loss() == pytest.approx(expected, abs=1e-5)


def test_an_error_while_updates_are_added_adds_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tiny_model("gpt2"))  # its Conv1D weights get their updates in the slot
    loop.draw(0)
    loop.train(3)
    expected = loop.loss()
    assert loop.offloader is not None
    loop.offloader.schedule.invalidate()
    exact = offloader_module.merge_update_

    def full(*given: Any) -> None:
        exact(*given)
        monkeypatch.setattr(offloader_module, "merge_update_", exact)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(offloader_module, "merge_update_", full)
    with pytest.raises(torch.OutOfMemoryError):
        loop.loss()
    assert loop.loss() == expected


def test_an_earlier_state_that_is_loaded_while_another_block_trains_is_taken_over_whole() -> None:
    loop = Loop(tiny_model("llama"))
    loop.draw(0)
    loop.train(2)
    assert loop.offloader is not None
    loop.offloader.saves_updates_separately = True
    weights = {name: weight.clone() for name, weight in loop.model.state_dict().items()}
    state = copy.deepcopy(loop.optimizer.state_dict())
    loop.offloader.saves_updates_separately = False
    expected = loop.loss()
    loop.draw(1, seed=8)
    loop.train(1)
    loop.model.load_state_dict(weights)
    loop.optimizer.load_state_dict(state)
    loop.model.state_dict()  # what block 1 learned at rest is added to it here, where it trains
    loop.draw(0)
    assert loop.loss() == expected


def test_weights_that_are_merged_in_inference_mode_can_train_later(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    disk, folder = Disk(str(tmp_path)), str(model_dir())
    options = {"attn_implementation": None, "trust_remote_code": False, "dtype": torch.float32}
    loop = Loop(load_mapped_model(folder, len(load_tokenizer(folder)), disk, **options).train(), disk=disk)
    loop.draw(0)
    loop.train(1)
    with torch.inference_mode():
        loop.model.state_dict()
    before = [p.clone() for p in loop.layers[1].parameters()]
    loop.draw(1)
    loop.train(1)
    assert any(not torch.equal(p, old) for p, old in zip(loop.layers[1].parameters(), before, strict=True))


def test_offloaded_weights_that_rest_need_names() -> None:
    """A saved state tells by names which weights what was learned belongs to."""
    loop = Loop(tiny_model("llama"))
    groups: list[dict[str, list[Tensor]]] = [{"params": list(loop.model.parameters())}]
    loop.optimizer = GaLoreAdamW(groups, lr=1e-2)
    assert loop.offloader is not None
    loop.offloader.attach_optimizer(loop.optimizer)
    with pytest.raises(UsageError, match="param_groups: offloaded weights that rest need names"):
        loop.draw(0)
