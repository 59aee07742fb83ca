"""The recipe's callbacks: how far blocks move, and what they find when they are drawn again."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.evidence.recipes import (
    BalancedDraws,
    KeptMoments,
    KeptRest,
    PolarDirection,
    RateByInclusion,
    ScaledGradient,
    SharedSubspaces,
    SlowRest,
    balanced_blocks,
    polar_factor,
)
from ows_lightning import LayerwiseSampling
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim import galore
from ows_lightning.optim.projected_adamw import projected_adamw_
from ows_lightning.sampling.inclusion import inclusion_probabilities
from tests.sampling.test_callback import LAYERS, Projected, fit


def trained(
    tmp_path: Path, distribution: str | list[float], steps: int, *callbacks: Callback, resting_rank: int = 0
) -> tuple[Projected, LayerwiseSampling]:
    torch.manual_seed(0)
    module = Projected()
    sampling = LayerwiseSampling(activated_layers=2, interval_steps=2, distribution=distribution, resting_rank=resting_rank)
    fit(module, sampling, tmp_path, *callbacks, max_steps=steps)
    return module, sampling


def test_equal_chances_change_nothing(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "plain", "uniform", 6)
    scaled, _ = trained(tmp_path / "scaled", "uniform", 6, RateByInclusion())
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # chances are a quadrature's


def test_a_step_is_divided_by_the_chance(tmp_path: Path) -> None:
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    torch.manual_seed(0)
    before = Projected()
    plain, sampling = trained(tmp_path / "plain", weights, 1)
    scaled, _ = trained(tmp_path / "scaled", weights, 1, RateByInclusion())
    chances = inclusion_probabilities(sampling.probabilities, 2)
    assert sampling.active_blocks
    for block in sampling.active_blocks:
        factor = 2 / LAYERS / chances[block]
        for start, p, q in zip(
            *(decoder_layers(module)[block].parameters() for module in (before, plain, scaled)), strict=True
        ):
            torch.testing.assert_close(q - start, factor * (p - start), rtol=1e-3, atol=1e-6)


def test_a_block_that_returns_finds_its_moments(tmp_path: Path) -> None:
    steps: dict[int, float] = {}

    class Counted(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            sampling = LayerwiseSampling.of(trainer)
            for block in sampling.active_blocks:
                weight = decoder_layers(pl_module)[block].self_attn.q_proj.weight
                steps[block] = float(trainer.optimizers[0].state[weight]["step"])

    _, sampling = trained(tmp_path, "uniform", 12, Counted(), KeptMoments())
    draws = [blocks for _, _, blocks in sampling.history]
    away = {block for before, after in pairwise(draws) for block in set(before) - set(after)}
    assert away & {block for blocks in draws[2:] for block in blocks}, "no block returns"
    assert steps == {block: 2.0 * sum(block in blocks for blocks in draws) for blocks in draws for block in blocks}


@pytest.mark.parametrize("weights", [[1.0] * 30, [1.0, 2.0, 4.0] * 10, [40.0] + [1.0] * 29])
def test_balanced_draws_take_each_block_as_often_as_expected(weights: list[float]) -> None:
    sampling = LayerwiseSampling(activated_layers=5, distribution=weights, seed=3)
    sampling.probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    chances = inclusion_probabilities(sampling.probabilities, 5)
    counts = np.zeros(30)
    for interval in range(6):  # a round
        drawn = balanced_blocks(sampling, interval)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 5
        counts[drawn] += 1
    assert (abs(counts - 6 * chances) < 1 + 1e-6).all()
    second = [balanced_blocks(sampling, interval) for interval in range(6, 12)]
    assert second != [balanced_blocks(sampling, interval) for interval in range(6)]


def test_balanced_draws_are_those_of_the_run(tmp_path: Path) -> None:
    _, sampling = trained(tmp_path, "uniform", 6, BalancedDraws())
    assert sorted(block for _, _, blocks in sampling.history for block in blocks) == list(range(LAYERS))


def test_a_block_that_rests_again_goes_on_where_it_was(tmp_path: Path) -> None:
    steps: list[tuple[int, float, list[int]]] = []

    class Counted(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            state = trainer.optimizers[0].state
            for block, layer in enumerate(decoder_layers(pl_module)):
                if "rest" in (of_weight := state.get(layer.self_attn.q_proj.weight, {})):
                    steps.append((block, float(of_weight["step"]), of_weight["rest"].tolist()))

    trained(tmp_path, "uniform", 12, Counted(), KeptRest(), resting_rank=2)
    for block in {block for block, _, _ in steps}:
        of_block = [(step, subspace) for other, step, subspace in steps if other == block]
        assert [step for step, _ in of_block] == [float(i + 1) for i in range(len(of_block))]
        assert all(subspace == of_block[0][1] for _, subspace in of_block)
    assert max(step for _, step, _ in steps) > 4  # rests of two steps each were joined


def test_weights_of_one_width_share_a_subspace_for_the_rest_of_one_draw(tmp_path: Path) -> None:
    subspaces: dict[tuple[int, int], list[torch.Tensor]] = {}

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            optimizer = trainer.optimizers[0]
            resting = {p: state for p, state in optimizer.state.items() if "rest" in state}
            for p, state in resting.items():
                key = int(state["rest"][0]), p.size(-1)
                subspaces.setdefault(key, []).append(optimizer.resting_projector(p).clone())

    trained(tmp_path, "uniform", 6, Seen(), SharedSubspaces(), resting_rank=2)
    assert all(torch.equal(q, of_draw[0]) for of_draw in subspaces.values() for q in of_draw)
    of_draws = [of_draw[0] for (_, width), of_draw in subspaces.items() if width == min(width for _, width in subspaces)]
    assert len(of_draws) > 1
    assert not torch.equal(of_draws[0], of_draws[1])


def test_only_blocks_at_rest_move_by_the_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = decoder_layers(Projected())
    plain, sampling = trained(tmp_path / "plain", "uniform", 1, resting_rank=2)
    slow, _ = trained(tmp_path / "slow", "uniform", 1, SlowRest(0.25), resting_rank=2)
    moved = 0
    for block in range(LAYERS):
        start, far, near = (layers[block].self_attn.q_proj.weight for layers in (before, *map(decoder_layers, (plain, slow))))
        if block in sampling.active_blocks:
            assert torch.equal(far, near)
        else:
            torch.testing.assert_close(near - start, 0.25 * (far - start), rtol=1e-3, atol=1e-7)
            moved += not torch.equal(near, start)
    assert moved


def test_the_polar_factor_turns_all_directions_alike() -> None:
    for shape in ((12, 4), (4, 12)):
        factor = polar_factor(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        smaller = factor.mT @ factor if shape[0] > shape[1] else factor @ factor.mT
        torch.testing.assert_close(smaller, 0.2**2 * 12 * torch.eye(4))
        assert factor.square().mean().sqrt() == pytest.approx(0.2)


def test_projected_weights_move_by_polar_factors_and_vectors_by_adam(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = Projected()
    polar, sampling = trained(tmp_path, "uniform", 1, PolarDirection())
    for block in sampling.active_blocks:
        start, end = (decoder_layers(module)[block].self_attn.q_proj.weight for module in (before, polar))
        moved = torch.linalg.svdvals(end - start)[:4]  # rank 4
        torch.testing.assert_close(moved, torch.full((4,), 1e-2 * 0.2 * max(4, len(start)) ** 0.5), rtol=1e-3, atol=0)
    assert galore.projected_adamw_ is projected_adamw_  # given back


def test_whole_gradients_are_scaled_row_by_row_and_vectors_move_by_adam() -> None:
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.zeros(3, 64)), torch.nn.Parameter(torch.zeros(3))
    optimizer = ScaledGradient([matrix, vector], lr=0.1, rank=4)
    matrix.grad, vector.grad = torch.randn(3, 64) * torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    torch.testing.assert_close(vector.detach(), -0.1 * vector.grad.sign())  # Adam's first step
    rows, gradients = matrix.detach(), matrix.grad
    torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), -gradients / gradients.norm(dim=1, keepdim=True))
    projected = (gradients @ optimizer.state[matrix]["projector"]).norm(dim=1)
    torch.testing.assert_close(rows.norm(dim=1), 0.1 * 4**0.5 * gradients.norm(dim=1) / projected)  # D is a row of four signs
