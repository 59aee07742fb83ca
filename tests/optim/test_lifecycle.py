"""GaLoreAdamW through what users do to an optimizer: two after one another, copies, changed options, lost micro-batches."""

from __future__ import annotations

import copy
import gc
import io
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from ows_lightning.errors import UsageError
from ows_lightning.optim.galore import GaLoreAdamW
from tests.offload.fake_gpu import Event, FakeGpu
from tests.optim.test_galore import RANK, distance, equal, groups, loss_of, net, train


def galore(model: nn.Module, in_backward: bool = True, gap: int = 4, **settings: object) -> GaLoreAdamW:
    optimizer = GaLoreAdamW(groups(model, update_proj_gap=gap), lr=1e-2, **settings)
    if in_backward:
        optimizer.project_in_backward()
    return optimizer


class ScaledSteps(LightningModule):
    """Manual optimization with a schedule and a GradScaler of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.net = False, net()

    def on_train_start(self) -> None:
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers(), 1000)
        self.scaler = torch.amp.GradScaler("cpu")

    def training_step(self, step: int, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.accumulating = False
        self.manual_backward(self.scaler.scale(loss_of(self.net, step)))
        self.scaler.unscale_(optimizer)
        optimizer.gradients()
        self.scaler.step(optimizer)
        self.scaler.update()
        self.schedule.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> GaLoreAdamW:
        return galore(self.net, in_backward=False)


class TestTwoOptimizers:
    @pytest.mark.parametrize("first_lives", [True, False])
    def test_the_second_trains_as_if_it_were_the_only_one(self, first_lives: bool) -> None:
        model = net()
        first = galore(model)
        train(model, first, range(3))
        alone = copy.deepcopy(model)
        if not first_lives:
            del first
        train(model, galore(model), range(3, 9))
        train(alone, galore(alone), range(3, 9))
        assert equal(model, alone)

    def test_the_first_is_freed(self) -> None:
        model = net()
        first = galore(model)
        train(model, first, range(3))
        gone, state = weakref.ref(first), weakref.ref(first.state[model[0].weight]["exp_avg"])
        second = galore(model)
        del first
        gc.collect()
        assert gone() is None
        assert state() is None
        train(model, second, range(2))

    def test_the_first_still_steps_beside_one_that_does_not_project_in_backward(self) -> None:
        model, alone = net(), net()
        first, _second = galore(model), galore(model, in_backward=False)
        train(model, first, range(6))
        train(alone, galore(alone), range(6))
        assert equal(model, alone)

    @pytest.mark.parametrize(
        "later",
        [lambda first: first.load_state_dict(first.state_dict()), lambda first: first.project_in_backward(False)],
        ids=["loads a state", "ends"],
    )
    def test_what_the_first_does_later_leaves_the_gradients_to_the_second(self, later: Callable[[GaLoreAdamW], None]) -> None:
        model, alone = net(), net()
        first, second = galore(model), galore(model)
        later(first)
        loss_of(model, 0).backward()
        assert model[0].weight.grad is None
        second.zero_grad()
        train(model, second, range(6))
        train(alone, galore(alone), range(6))
        assert equal(model, alone)

    def test_lightnings_wrapper_and_what_it_wraps_are_one(self) -> None:
        model = net()
        optimizer = galore(model, in_backward=False)
        wrapper = LightningOptimizer(optimizer)
        wrapper.project_in_backward()  # type: ignore[attr-defined]
        optimizer.project_in_backward(False)
        loss_of(model, 0).backward()
        assert model[0].weight.grad is not None

    def test_schedulers_and_scalers_may_hold_lightnings_wrapper(self, tmp_path: Path) -> None:
        """As with ``self.optimizers()`` in manual optimization: both put attributes on it, and take some away again."""
        plain, module = net(), ScaledSteps()
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, range(3))
        train(plain, galore(plain, in_backward=False), range(3))
        for one, other in zip(module.net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other)

    def test_gradients_are_everybodys_again_when_it_is_gone(self) -> None:
        model = net()
        optimizer = galore(model)
        del optimizer
        gc.collect()
        loss_of(model, 0).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_projecting_in_backward_twice_is_once_and_can_be_ended(self) -> None:
        model, plain = net(), net()
        optimizer = galore(model)
        optimizer.project_in_backward()
        train(model, optimizer, range(5))
        train(plain, galore(plain, in_backward=False), range(5))
        assert equal(model, plain)
        optimizer.project_in_backward(False)
        optimizer.zero_grad()
        loss_of(model, 5).backward()
        assert model[0].weight.grad is not None

    def test_a_group_that_is_added_later_is_projected_in_backward_too(self) -> None:
        model = net()
        first, *others = groups(model)
        weights = first.pop("params")
        optimizer = GaLoreAdamW([{**first, "params": weights[:1]}, *others])
        optimizer.project_in_backward()
        optimizer.add_param_group({**first, "params": weights[1:]})
        loss_of(model, 0).backward()
        assert model[2].weight.grad is None


def by_pickle(pair: tuple[nn.Module, GaLoreAdamW]) -> tuple[nn.Module, GaLoreAdamW]:
    file = io.BytesIO()
    torch.save(pair, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def by_state(pair: tuple[nn.Module, GaLoreAdamW]) -> tuple[nn.Module, GaLoreAdamW]:
    model = copy.deepcopy(pair[0])
    optimizer = galore(model)  # with none of the options
    optimizer.load_state_dict(copy.deepcopy(pair[1].state_dict()))
    return model, optimizer


@pytest.mark.parametrize("through", [copy.deepcopy, by_pickle, by_state])
@pytest.mark.parametrize(
    "settings",
    [
        {"moments_dtype": "bfloat16"},
        {"moments_at_renewal": "reset"},
        {"moments_at_renewal": "reproject", "max_grad_norm": 0.01},
        {"stochastic_rounding": True},
    ],
)
def test_copies_pickles_and_states_carry_all_options(through: Callable, settings: dict) -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = galore(model, **settings)
    train(model, optimizer, range(6))
    other_model, other = through((model, optimizer))
    train(model, optimizer, range(6, 12))
    train(other_model, other, range(6, 12))
    assert equal(model, other_model)
    loss_of(other_model, 0).backward()
    assert other_model[0].weight.grad is None, "the copy does not project in backward"


@pytest.mark.parametrize("through", [copy.deepcopy, by_pickle, by_state])
def test_a_frozen_weight_is_hooked_for_when_it_trains(through: Callable) -> None:
    model = net()
    optimizer = galore(model)
    train(model, optimizer, range(3))
    model[0].weight.requires_grad_(False)
    other_model, other = through((model, optimizer))
    other.load_state_dict(other.state_dict())
    assert not other_model[0].weight.requires_grad
    other_model[0].weight.requires_grad_(True)
    loss_of(other_model, 0).backward()
    assert other_model[0].weight.grad is None
    assert len(other.gradients()) == len(list(other_model.parameters()))


def test_a_hook_of_ones_own_may_change_a_state_before_it_is_loaded() -> None:
    """As torch's documentation has it, to load by name."""
    one, other = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.eye(8))
    optimizer = GaLoreAdamW([{"params": [("one", one), ("other", other)]}], lr=1e-2)
    (one.sum() + 2 * (other * other).sum()).backward()
    optimizer.step()
    turned = GaLoreAdamW([{"params": [("other", other), ("one", one)]}], lr=1e-2)

    def by_name(_: torch.optim.Optimizer, given: dict) -> dict:
        return {**given, "state": {0: given["state"][1], 1: given["state"][0]}}

    turned.register_load_state_dict_pre_hook(by_name)
    turned.load_state_dict(optimizer.state_dict())
    for p in (one, other):
        assert torch.equal(turned.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_loads_and_switches_leave_nothing_behind() -> None:
    model = net()
    optimizer = galore(model)

    def finalizers() -> int:
        gc.collect()
        return len(weakref.finalize._registry)  # type: ignore[attr-defined]

    before = finalizers()
    for _ in range(5):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.project_in_backward(False)
        optimizer.project_in_backward()
    assert finalizers() == before


@pytest.mark.parametrize("in_backward", [True, False])
def test_a_loop_within_autocast_multiplies_as_one_outside(in_backward: bool) -> None:
    """Lightning's manual optimization calls backward and step within it."""
    models = [net(), net()]
    for model, all_within in zip(models, (True, False), strict=True):
        optimizer = galore(model, in_backward)
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                if all_within:
                    loss.backward()
                    optimizer.step()
            if not all_within:
                loss.backward()
                optimizer.step()
    assert equal(*models)


def test_complex_weights_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="complex weights are not supported"):
        GaLoreAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = GaLoreAdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="complex weights are not supported"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1  # what is refused is not stepped either
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = GaLoreAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_groups_may_have_the_same_names(caplog: pytest.LogCaptureFixture) -> None:
    one, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    optimizer = GaLoreAdamW([{"params": list(layer.named_parameters())} for layer in (one, other)])
    before, x = one.weight.clone(), torch.ones(2, 8)
    (one(x) * float("nan") + other(x)).sum().backward()
    assert len(optimizer.gradients()) == 2
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(one.weight, before)


def test_the_state_of_an_optimizer_without_rank_is_refused() -> None:
    model = net()
    optimizer = galore(model)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in groups(model)])
    loss_of(model, 0).backward()
    adamw.step()
    with pytest.raises(ValueError, match=f"rank {RANK}, the loaded state None"):
        optimizer.load_state_dict(adamw.state_dict())


def test_the_state_of_an_optimizer_with_rank_is_refused_by_one_without() -> None:
    model = net()
    optimizer = galore(model)
    train(model, optimizer, range(1))
    full_rank = GaLoreAdamW([{"params": group["params"]} for group in groups(model)])
    with pytest.raises(ValueError, match=f"group 0 has rank None, the loaded state {RANK}"):
        full_rank.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_the_state_of_an_adamw_that_does_something_else_is_refused(option: str) -> None:
    model = net()
    adamw = torch.optim.AdamW(model.parameters(), **{option: True})
    loss_of(model, 0).backward()
    adamw.step()
    optimizer = GaLoreAdamW(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=f"{option}: True is not supported"):
        optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state
    with pytest.raises(ValueError, match=f"{option}: True is not supported"):
        GaLoreAdamW([{"params": model.parameters(), option: True}])


def test_the_state_of_an_adafactor_is_refused() -> None:
    model = net()
    optimizer = GaLoreAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"eps: \(None, 0.001\) must be at least 0"):
        optimizer.load_state_dict(torch.optim.Adafactor(model.parameters()).state_dict())


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("moments_at_renewal", ["keep", "reproject"])
def test_a_state_from_another_precision_is_taken(before: torch.dtype, after: torch.dtype, moments_at_renewal: str) -> None:
    model, other_model = net(dtype=before), net(dtype=after)
    optimizer, other = (galore(m, moments_at_renewal=moments_at_renewal) for m in (model, other_model))
    train(model, optimizer, range(3))
    other.load_state_dict(optimizer.state_dict())
    train(other_model, other, range(3, 6))  # it renews in between
    assert all(p.isfinite().all() for p in other_model.parameters())


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_changed_dtype_of_moments_holds_from_the_next_step_on(before: str, after: str) -> None:
    model = net()
    optimizer = galore(model, moments_dtype=before)
    train(model, optimizer, range(3))
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    for group in optimizer.param_groups:
        group.update(moments_dtype=after, lr=0.0)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    now = optimizer.state[model[0].weight]["exp_avg"]
    assert now.dtype == getattr(torch, after)
    torch.testing.assert_close(now.float(), 0.9 * moment.float(), rtol=2e-2, atol=1e-6)


class TestEveryGradientCounts:
    @pytest.mark.parametrize("gap", [1, 3])
    def test_one_that_the_last_micro_batch_does_not_bring(self, gap: int) -> None:
        """As an expert's, which sees no token of some micro-batches."""
        accumulated, whole = net(dtype=torch.float64), net(dtype=torch.float64)
        one, other = galore(accumulated, gap=gap), galore(whole, in_backward=False, gap=gap)
        for step in range(5):
            one.zero_grad()
            one.accumulating = True
            loss_of(accumulated, step).backward()
            one.accumulating = False
            accumulated[2].bias.sum().backward()  # no matrix is in it
            one.step()
            other.zero_grad()
            (loss_of(whole, step) + whole[2].bias.sum()).backward()
            other.step()
        assert distance(whole, net(dtype=torch.float64)) > 0.01
        assert distance(accumulated, whole) < 1e-6

    def test_it_is_among_the_gradients_and_clipped(self) -> None:
        model = net()
        optimizer = galore(model)
        optimizer.accumulating = True
        loss_of(model, 0).backward()
        optimizer.accumulating = False
        model[2].bias.sum().backward()
        assert len(optimizer.gradients()) == 4
        optimizer.clip_gradients(0.1)
        assert torch.nn.utils.get_total_norm(optimizer.gradients()).item() == pytest.approx(0.1, rel=1e-4)

    def test_that_of_a_frozen_matrix_does_not(self) -> None:
        model = net()
        optimizer = galore(model)
        train(model, optimizer, range(2))
        before = model[0].weight.clone()
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        model[0].weight.requires_grad_(False)
        optimizer.state.pop(model[0].weight)
        optimizer.step()
        assert torch.equal(model[0].weight, before)


class TestShapes:
    @pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 8)])
    def test_an_empty_parameter_does_no_harm(self, shape: tuple[int, ...]) -> None:
        empty, weight = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(8, 8))
        optimizer = GaLoreAdamW([{"params": [empty, weight], "rank": 2}])
        optimizer.project_in_backward()
        (empty.sum() + weight.square().sum()).backward()
        optimizer.clip_gradients(1.0)
        optimizer.step()
        assert weight.mean() < 1

    def test_four_dimensions_train_in_full_rank(self) -> None:
        start = torch.randn(6, 5, 7, 8)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        optimizers = GaLoreAdamW([{"params": [ours], "rank": 2}]), GaLoreAdamW([theirs])
        optimizers[0].project_in_backward()
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.square().sum().backward()
            optimizer.step()
        assert torch.equal(ours, theirs)


class TestClipping:
    @pytest.mark.parametrize("in_backward", [True, False])
    def test_max_grad_norm_bounds_what_the_step_consumes(self, in_backward: bool) -> None:
        ours, by_hand = net(), net()
        one, other = galore(ours, in_backward, max_grad_norm=0.01), galore(by_hand)
        for step in range(6):
            for model, optimizer in ((ours, one), (by_hand, other)):
                optimizer.zero_grad()
                loss_of(model, step).backward()
            gradients = other.gradients()
            norm = torch.nn.utils.get_total_norm(gradients)
            assert norm > 0.01
            torch._foreach_mul_(gradients, 0.01 / (norm + 1e-6))
            one.step()
            other.step()
        assert equal(ours, by_hand)

    def test_by_value(self) -> None:
        model = net()
        optimizer = galore(model)
        loss_of(model, 0).backward()
        optimizer.clip_gradients(0.003, "value")
        assert max(gradient.abs().max() for gradient in optimizer.gradients()).item() == pytest.approx(0.003)

    @pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
    def test_by_value_hides_no_gradient_that_is_not_finite(self, bad: float) -> None:
        model, before = net(), net()
        optimizer = galore(model)
        loss_of(model, 0).backward()
        optimizer.gradients()[0][0, 0] = bad
        optimizer.clip_gradients(0.003, "value")
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert equal(model, before)


class TestLossScaler:
    def test_with_projection_in_backward_it_is_refused(self) -> None:
        model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = galore(model)
        scaler.scale(loss_of(model, 0)).backward()
        with pytest.raises(UsageError, match="project_in_backward"):
            scaler.step(optimizer)

    def test_without_it_steps_are_those_without_a_scaler(self) -> None:
        scaled, plain, scaler = net(), net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        one, other = galore(scaled, in_backward=False), galore(plain, in_backward=False)
        for step in range(6):
            one.zero_grad()
            scaler.scale(loss_of(scaled, step)).backward()
            scaler.unscale_(one)
            one.clip_gradients(0.05)
            scaler.step(one)
            scaler.update()
            other.zero_grad()
            loss_of(plain, step).backward()
            other.clip_gradients(0.05)
            other.step()
        assert distance(scaled, plain) < 1e-6


def test_a_run_that_never_reads_the_time_of_its_renewals_keeps_no_event_of_them() -> None:
    with FakeGpu(late=False).installed():
        weight = nn.Parameter(torch.rand(8, 6, device="cuda"))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 1}])
        before = sum(isinstance(each, Event) for each in gc.get_objects())
        for _ in range(5):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = sum(isinstance(each, Event) for each in gc.get_objects()) - before
        del weight, optimizer
    assert kept == 0


def test_a_skipped_step_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    model, alone = net(), net()
    optimizer, other = galore(model), galore(alone)
    train(model, optimizer, range(4))
    train(alone, other, range(4))
    optimizer.zero_grad()
    for skipped in (1, 2):
        (loss_of(model, 4) * float("nan")).backward()
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        assert optimizer.skipped_steps == skipped
        model.zero_grad()  # not the optimizer's, which would drop what is projected, too
    assert "Step skipped" in caplog.text
    loss_of(model, 5).backward()
    optimizer.step()
    train(model, optimizer, range(6, 9))
    train(alone, other, range(5, 9))
    assert equal(model, alone)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (40, RANK)
