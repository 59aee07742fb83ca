"""Linear layers that hand over their gradient as factors: the same updates without the gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.linear import ProjectedLinear

WIDE, NARROW, RANK = 48, 20, 4


class Net(nn.Module):
    """Blocks with a matrix for either side, one with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW, bias=False)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def inputs(step: int) -> Tensor:
    return torch.randn(3, 7, NARROW, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module, factors: bool = True, **settings: Any) -> GaLoreAdamW:
    group = {"rank": RANK, "update_proj_gap": 4, "subspace": "svd", **settings}
    optimizer = GaLoreAdamW([{"params": list(model.parameters()), **group}], lr=1e-2)
    optimizer.project_in_backward(model=model if factors else None)
    return optimizer


def train(model: nn.Module, optimizer: GaLoreAdamW, steps: int = 6, micro_batches: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro_batches):
            optimizer.accumulating = part < micro_batches - 1
            model(inputs(10 * step + part)).square().mean().backward()
        optimizer.step()


def products(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def assert_close(one: nn.Module, other: nn.Module) -> None:
    # Float64 but for the subspaces, whose float32 decomposition sees weights that differ in the last bits.
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_updates_are_those_of_whole_gradients(proj_type: str, micro_batches: int) -> None:
    whole, factored = net(), net()
    train(whole, optimizer_of(whole, factors=False, proj_type=proj_type), micro_batches=micro_batches)
    train(factored, optimizer_of(factored, proj_type=proj_type), micro_batches=micro_batches)
    assert_close(whole, factored)


def test_computes_less_but_where_a_subspace_is_renewed() -> None:
    counts = {}
    for factors in (False, True):
        model = net()
        optimizer = optimizer_of(model, factors, update_proj_gap=2)
        counts[factors] = []
        for step in range(4):
            optimizer.zero_grad()
            loss = model(inputs(step)).square().mean()
            counts[factors].append(products(loss.backward))
            optimizer.step()
    tokens, cells, edges = 3 * 7, 4 * WIDE * NARROW, 4 * (WIDE + NARROW)
    saved = 2 * tokens * cells + 2 * RANK * cells - 2 * tokens * RANK * edges
    assert [whole - factored for whole, factored in zip(counts[False], counts[True], strict=True)] == [0, saved, 0, saved]


def test_a_rank_that_saves_nothing_takes_whole_gradients() -> None:
    model = net()
    optimizer = optimizer_of(model, rank=NARROW - 1)
    train(model, optimizer, 1)
    p = model.layers[0][0].weight
    assert not optimizer.accumulate_factors(p, torch.ones(2, WIDE).double(), torch.ones(2, NARROW).double())


def test_a_hook_on_a_weight_sees_its_gradient() -> None:
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    seen: list[torch.Size] = []
    handle = model.layers[0][0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    train(model, optimizer, 2)
    assert seen == [(WIDE, NARROW)] * 2
    handle.remove()
    train(model, optimizer, 1)
    assert len(seen) == 2


def test_gradients_come_back_when_projection_in_backward_ends() -> None:
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    assert type(model.layers[0][0]) is ProjectedLinear
    optimizer.zero_grad()
    optimizer.project_in_backward(False)
    assert type(model.layers[0][0]) is nn.Linear
    model(inputs(0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_are_those_of_whoever_projects() -> None:
    model = net()
    blocks = [[p for p in block.parameters() if p.dim() == 2] for block in model.layers]
    first, second = (GaLoreAdamW([{"params": weights, "rank": 4}]) for weights in (blocks[0], blocks[1]))
    first.project_in_backward(model=model)
    second.project_in_backward(model=model)
    first.project_in_backward(False)
    assert type(model.layers[0][0]) is nn.Linear
    assert type(model.layers[1][0]) is ProjectedLinear
    del second  # as when a notebook's cell runs again
    again = optimizer_of(model)
    again.project_in_backward(False)
    assert not any(type(module) is ProjectedLinear for module in model.modules())


def test_a_copy_during_training_can_be_differentiated_twice() -> None:
    model = net()
    _optimizer = optimizer_of(model)
    copied, x = copy.deepcopy(model), inputs(0).requires_grad_()
    (gradient,) = torch.autograd.grad(copied(x).square().mean(), x, create_graph=True)
    gradient.square().sum().backward()


def test_a_layer_without_an_optimizer_is_an_ordinary_one() -> None:
    model, plain = net(), net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    plain.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)  # nobody projects its gradients
    del optimizer
    for one in (model, copied, plain):
        one.zero_grad()
        one(inputs(3)).sum().backward()
    for a, b, c in zip(model.parameters(), copied.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, c.grad)
        torch.testing.assert_close(b.grad, c.grad)


def test_frozen_layers_and_the_lowest_one_compute_as_ever() -> None:
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.layers[0].state_dict())
    loss = model(inputs(1)).square().mean()
    tokens, cells = 3 * 7, 2 * WIDE * NARROW
    factors = 2 * tokens * RANK * 2 * (WIDE + NARROW)
    assert products(loss.backward) == factors + 2 * tokens * cells // 2  # the gradient of the second matrix's input alone
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.layers[0].state_dict().items())


def test_recomputed_layers_and_shared_ones_add_up() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.layers[0], self.layers[1], self.layers[0]):
                x = x + checkpoint(layer, x, use_reentrant=False) if self.recomputes else x + layer(x)
            return x

    models = []
    for factors, recomputes in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = Twice().double()
        model.recomputes = recomputes
        train(model, optimizer_of(model, factors))
        models.append(model)
    assert_close(models[0], models[1])
    assert_close(models[1], models[2])


def test_in_mixed_precision_gradients_are_those_of_autocast() -> None:
    grown = []
    for factors in (False, True):
        model = net().float()
        optimizer = optimizer_of(model, factors)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs(step).float()).square().mean()
            loss.backward()
            optimizer.step()
        grown.append(model)
    assert all(torch.equal(a, b) for a, b in zip(grown[0].parameters(), grown[1].parameters(), strict=True))


def optimizer_at_rest(model: nn.Module, rests: bool, factors: bool = True) -> GaLoreAdamW:
    """An optimizer that projects within backward, of matrices that may train at rest."""
    optimizer = optimizer_of(model, factors)
    if rests:
        optimizer.rest([p for p in model.parameters() if p.dim() == 2], 3)
    return optimizer


class InPlace(Net):
    """Writes into what its linear layers return, as OLMo's clipping and Llama 4's experts do."""

    def forward(self, x: Tensor) -> Tensor:
        for up, _, down in self.layers:
            x = x + down(up(x).clamp_(-0.5, 0.5)).mul_(2)
        return x


@pytest.mark.parametrize("rests", [False, True])
def test_what_a_layer_returns_can_be_written_to(rests: bool) -> None:
    trained = []
    for factors in (True, False):
        torch.manual_seed(0)
        model = InPlace().double()
        train(model, optimizer_at_rest(model, rests, factors))
        trained.append(model)
    torch.testing.assert_close(list(trained[0].parameters()), list(trained[1].parameters()))


@pytest.mark.parametrize("rests", [False, True])
def test_a_gradient_of_inputs_alone_leaves_none_of_weights(rests: bool) -> None:
    """As an adversarial perturbation or a penalty takes it, between two steps."""
    model = net()
    optimizer = optimizer_at_rest(model, rests)
    train(model, optimizer, steps=1)  # subspaces are known
    optimizer.zero_grad()
    x = inputs(1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().mean(), [x])
    assert gradient.norm() > 0
    assert optimizer.gradients() == []


@pytest.mark.parametrize("rests", [False, True])
def test_no_rows_and_a_single_one_pass(rests: bool) -> None:
    """An expert may see no token, and an input may have no dimension but its own."""
    model = net()
    optimizer = optimizer_at_rest(model, rests)
    train(model, optimizer, steps=1)
    optimizer.zero_grad()
    assert model(inputs(0)[0, :0]).shape == (0, NARROW)
    model(inputs(0)[0, :0]).sum().backward()
    assert all(not gradient.any() for gradient in optimizer.gradients())
    assert model(inputs(0)[0, 0]).shape == (NARROW,)


def test_a_pruned_layer_trains_what_is_left() -> None:
    """Its weight is no parameter, but computed from one before each forward pass."""
    model = net()
    prune.l1_unstructured(model.layers[0][0], "weight", 0.5)
    pruned = model.layers[0][0].weight == 0
    before = model.layers[0][0].weight_orig.clone()
    train(model, optimizer_of(model))
    assert not torch.equal(model.layers[0][0].weight_orig, before)
    model(inputs(0))
    assert torch.equal(model.layers[0][0].weight == 0, pruned)
