from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ows_lightning.optim.state_dtypes import keep_state_dtypes


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.AdamW])
def test_a_loaded_optimizer_goes_on_bit_for_bit(kind: type[torch.optim.Optimizer]) -> None:
    def train(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
            optimizer.step()

    weight = nn.Parameter(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = kind([weight], lr=1e-2)
    train(weight, optimizer, range(3))
    resumed = nn.Parameter(weight.detach().clone())
    other = kind([resumed], lr=1e-2)
    keep_state_dtypes(other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[weight].items():
        assert other.state[resumed][key].dtype == value.dtype
        assert torch.equal(other.state[resumed][key], value)
    train(weight, optimizer, range(3, 40))
    train(resumed, other, range(3, 40))
    assert torch.equal(weight, resumed)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.AdamW])
def test_moments_follow_a_weight_whose_dtype_has_changed(kind: type[torch.optim.Optimizer]) -> None:
    weight, resumed = (nn.Parameter(torch.ones(4, 4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    optimizer, other = kind([weight]), kind([resumed])
    weight.grad, resumed.grad = torch.ones_like(weight), torch.ones_like(resumed)
    optimizer.step()
    keep_state_dtypes(other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[resumed]["exp_avg"].dtype == torch.float32
    other.step()
    assert torch.isfinite(resumed).all()
