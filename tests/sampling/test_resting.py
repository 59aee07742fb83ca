"""Blocks that train at rest: against the formula, and through what a run does to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.subspace import random_subspace
from ows_lightning.sampling.sampler import BlockSampler
from tests.tiny import tiny_batch, tiny_model

RANK, LR, INTERVAL = 3, 1e-2, 2
DRAWS = [[1], [2], [3], [1]]  # of the 4 blocks


class Given(BlockSampler):
    """Trains the blocks of ``DRAWS``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(1, INTERVAL, "uniform", always_train=(), **{"resting_rank": RANK, **settings})

    def blocks_of(self, interval: int) -> list[int]:
        return DRAWS[interval]


class Run:
    """A loop of one's own, which can be saved and resumed."""

    def __init__(self, architecture: str = "llama", in_backward: bool = True, checkpointed: bool = False, **settings: Any):
        self.model = tiny_model(architecture)
        for dropout in (module for module in self.model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = galore_param_groups(self.model, rank=8, update_proj_gap=3)
        self.optimizer = GaLoreAdamW(groups, lr=LR, **settings.pop("optimizer", {}))
        if in_backward:
            self.optimizer.project_in_backward(model=self.model)
        self.sampler = Given(**settings)
        self.step = 0
        self.sampler.attach(self.model)

    def train(self, steps: int, micro_batches: int = 1) -> Run:
        compute = lambda: self.sampler.compute_scores(self.model, None)  # noqa: E731
        self.sampler.start(self.step, [self.optimizer], compute)
        for _ in range(steps):
            self.sampler.advance(self.step, [self.optimizer], compute)
            rows = tiny_batch(4, seed=self.step)
            for part in range(micro_batches):
                self.optimizer.accumulating = part < micro_batches - 1
                batch = {name: values.chunk(micro_batches)[part] for name, values in rows.items()}
                (self.model(**batch).loss / micro_batches).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return self

    def save(self, path: Path) -> None:
        parts = (self.model, self.optimizer, self.sampler)
        torch.save([self.step, *(part.state_dict() for part in parts)], path)

    def load(self, path: Path) -> Run:
        self.step, model, optimizer, sampler = torch.load(path, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.sampler.load_state_dict(sampler)
        return self


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)  # steps are of 1e-2


def matrices(block: nn.Module) -> list[nn.Parameter]:
    return [p for p in block.parameters() if p.dim() >= 2]


def by_the_formula(weight: Tensor, gradient: Tensor, q: Tensor, state: dict[str, Any]) -> None:
    """One step of a weight at rest: R = G Q, W <- W - lr Adam(R) Q^T."""
    r = gradient @ q
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * r
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * r**2
    weight -= LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-8) @ q.mT


@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_equals_the_formula_in_a_plain_loop(architecture: str, in_backward: bool) -> None:
    run = Run(architecture, in_backward)
    rest: dict[str, dict[str, Any]] = {}  # what the formula keeps of each weight at rest
    numbers = {p: number for number, p in enumerate(p for group in run.optimizer.param_groups for p in group["params"])}
    for step in range(INTERVAL * len(DRAWS)):
        reference = copy.deepcopy(run.model)  # without the optimizer's hooks
        reference.requires_grad_(True)
        reference(**tiny_batch(4, seed=step)).loss.backward()
        run.train(1)
        interval = step // INTERVAL
        resting = {
            name
            for index, block in enumerate(decoder_layers(reference))
            for name, p in reference.named_parameters()
            if index > DRAWS[interval][0] and any(p is other for other in matrices(block))
        }
        rest = {name: state for name, state in rest.items() if name in resting}  # dropped with the rest
        for name in resting:
            weight, trained = reference.get_parameter(name), run.model.get_parameter(name)
            state = rest.setdefault(name, {"seed": 1_000_003 * interval + numbers[trained]})
            with torch.no_grad():
                by_the_formula(weight, weight.grad, random_subspace(weight, RANK, state["seed"]), state)
            torch.testing.assert_close(trained, weight, rtol=1e-4, atol=1e-5)
    assert not rest.keys() - {name for name, _ in run.model.named_parameters()}


def test_what_is_below_the_lowest_active_block_and_vectors_stay_bit_by_bit() -> None:
    run = Run()
    before = copy.deepcopy(run.model)
    run.train(INTERVAL)  # block 1 is active
    blocks, old = decoder_layers(run.model), decoder_layers(before)
    assert equal(blocks[0], old[0])
    assert not any(p.requires_grad or p in run.optimizer.state for p in blocks[0].parameters())
    for index in (2, 3):
        for p, q in zip(blocks[index].parameters(), old[index].parameters(), strict=True):
            assert torch.equal(p, q) == (p.dim() < 2)
            assert p.requires_grad == (p.dim() >= 2) == (p in run.optimizer.state)
    assert all(p.requires_grad for p in blocks[1].parameters())


def test_its_state_is_two_moments_of_the_resting_rank_and_no_projector() -> None:
    run = Run().train(INTERVAL + 1)  # block 2 is active, block 1 was
    blocks = decoder_layers(run.model)
    for p in matrices(blocks[3]):
        shapes = {key: tuple(value.shape) for key, value in run.optimizer.state[p].items()}
        moment = (p.size(0), RANK)
        assert shapes == {"rest": (2,), "step": (), "exp_avg": moment, "exp_avg_sq": moment}
        assert int(run.optimizer.state[p]["step"]) == INTERVAL + 1  # it goes on at rest
    assert all("projector" in run.optimizer.state[p] for p in matrices(blocks[2]))
    assert not any(p in run.optimizer.state for p in blocks[1].parameters())


@pytest.mark.parametrize("saved_at", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [{}, {"moments_dtype": "bfloat16", "state_warmup_steps": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one(saved_at: int, optimizer: dict, tmp_path: Path) -> None:
    whole = Run(optimizer=optimizer).train(8)
    Run(optimizer=optimizer).train(saved_at).save(tmp_path / "state.pt")
    resumed = Run(optimizer=optimizer).load(tmp_path / "state.pt").train(8 - saved_at)
    assert equal(whole.model, resumed.model)


def test_rank_0_is_the_method_without() -> None:
    assert not any("rest" in state for state in Run(resting_rank=0).train(8).optimizer.state.values())
    assert Run().sampler.state_dict()["settings"]["resting_rank"] == RANK


def test_checkpointed_blocks_and_micro_batches_train_alike() -> None:
    plain, recomputed, accumulated = Run().train(6), Run(checkpointed=True).train(6), Run().train(6, micro_batches=4)
    assert equal(plain.model, recomputed.model)
    close(plain.model, accumulated.model)


def test_keeps_projected_inputs_for_backward_instead_of_inputs() -> None:
    def kept(resting_rank: int) -> int:
        run, sizes = Run(resting_rank=resting_rank), {}
        run.train(0)

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.model(**tiny_batch(4))
        return sum(sizes.values())

    tokens, linear_layers = 4 * 16, 2 * 7
    assert kept(RANK) - kept(0) == tokens * linear_layers * RANK * 4


def test_its_gradients_count_in_the_norm_and_a_nan_skips_the_step() -> None:
    run = Run().train(1)
    run.model(**tiny_batch(4)).loss.backward()
    shapes = [tuple(gradient.shape) for gradient in run.optimizer.gradients()]
    resting = [(p.size(0), RANK) for block in decoder_layers(run.model)[2:] for p in matrices(block)]
    assert [shape for shape in shapes if shape[-1] == RANK] == resting
    before = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"]])
    run.optimizer.gradient_of(matrices(decoder_layers(run.model)[3])[0])[0, 0] = float("nan")
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    torch.testing.assert_close([run.model.state_dict(), run.optimizer.state_dict()["state"]], before, rtol=0, atol=0)


def test_weight_decay_leaves_a_resting_weight_outside_its_subspace_alone() -> None:
    run = Run(optimizer={"weight_decay": 0.1})
    weight = decoder_layers(run.model)[3].mlp.up_proj.weight
    before = weight.detach().clone()
    run.train(INTERVAL)
    rank, seed = run.optimizer.state[weight]["rest"].tolist()
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    number = next(number for number, p in enumerate(held) if p is weight)
    q = random_subspace(weight, rank, 1_000_003 * seed + number)
    moved = weight.detach() - before
    assert moved.norm() > 0
    torch.testing.assert_close(moved @ q @ q.mT, moved, rtol=1e-4, atol=1e-6)


def test_a_copied_optimizer_goes_on_alike() -> None:
    run = Run(in_backward=False).train(3)
    other = copy.deepcopy(run)
    assert equal(run.train(3).model, other.train(3).model)


def test_an_optimizer_that_cannot_is_refused() -> None:
    model, sampler = tiny_model("llama"), Given()
    sampler.attach(model)
    with pytest.raises(
        UsageError, match=r"^sampling\.resting_rank: AdamW can't train frozen blocks at rest; take GaLoreAdamW"
    ):
        sampler.start(0, [torch.optim.AdamW(model.parameters())], lambda: sampler.compute_scores(model, None))
    with pytest.raises(UsageError, match=r"^sampling\.resting_rank: -1 must be at least 1, or 0"):
        Given(resting_rank=-1)
    with pytest.raises(ValueError, match="rank: 32 makes a weight of shape"):
        GaLoreAdamW(model.parameters()).rest(model.parameters(), 32)


def test_the_subspace_is_orthonormal_and_another_for_every_seed() -> None:
    weight = torch.empty(2, 5, 20, dtype=torch.float64)
    one, other = random_subspace(weight, 4, 0), random_subspace(weight, 4, 1)
    assert one.shape == (2, 20, 4)
    torch.testing.assert_close(one.mT @ one, torch.eye(4).double().expand(2, 4, 4))
    assert torch.equal(one, random_subspace(weight, 4, 0))
    assert (one.mT @ other).abs().max() < 0.9
