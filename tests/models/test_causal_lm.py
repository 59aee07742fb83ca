"""CausalLM under what converts and moves modules."""

from __future__ import annotations

import pytest
import torch

from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.lora import add_lora
from ows_lightning.offload.offloader import BlockOffloader
from tests.tiny import tiny_model


def test_conversion_leaves_frequencies_as_they_are() -> None:
    model, expected = CausalLM(tiny_model("llama")), dict(tiny_model("llama").named_buffers(prefix="model"))
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(dict(model.named_buffers()), expected, rtol=0, atol=0)
    model.to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("offloaded", [False, True])
def test_what_a_model_in_half_precision_has_in_float32_stays_so(offloaded: bool) -> None:
    pytest.importorskip("peft")
    model = CausalLM(add_lora(tiny_model("llama", dtype=torch.bfloat16), {"r": 2}))
    if offloaded:
        BlockOffloader(decoder_layers(model), frozen_only=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert {value.dtype for value in expected.values()} == {torch.bfloat16, torch.float32}  # the adapters
    torch.testing.assert_close(dict(model.bfloat16().state_dict()), expected, rtol=0, atol=0)


def test_a_loss_that_is_left_out_is_said() -> None:
    model = CausalLM(tiny_model("mixtral", output_router_logits=True))
    with pytest.warns(UserWarning, match="balancing its experts"):
        model.check_logits(torch.arange(4)[None])
