"""The randomized subspace against the exact one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor

from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.subspace import Sketch, find_subspace, singular_vectors
from tests.tiny import tiny_batch, tiny_model


@pytest.mark.parametrize("method", ["randomized", "svd", "random"])
def test_projectors_are_laid_out_as_they_are_loaded_from_shards(method: str) -> None:
    few_directions = torch.randn(4, 32, 2) @ torch.randn(4, 2, 32)
    assert leading_singular_vectors(few_directions, 8, "right", method).is_contiguous()


def leading_singular_vectors(gradient: Tensor, rank: int, side: str, method: str, seed: int = 0) -> Tensor:
    found = find_subspace(gradient, rank, side, method, seed)
    return next(singular_vectors([found])).to(gradient.dtype) if isinstance(found, Sketch) else found


def captured(gradient: Tensor, rank: int, side: str, method: str) -> float:
    """Norm of the gradient's part in the subspace."""
    vectors = leading_singular_vectors(gradient, rank, side, method).float()
    gradient = gradient.float()
    return (gradient @ vectors if side == "right" else vectors.mT @ gradient).norm().item()


@pytest.mark.parametrize("method", ["randomized", "svd"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (3, 30, 50)])
def test_vectors_are_orthonormal(method: str, side: str, shape: tuple[int, ...]) -> None:
    vectors = leading_singular_vectors(torch.randn(shape), 8, side, method)
    assert vectors.shape == (*shape[:-2], shape[-2] if side == "left" else shape[-1], 8)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(8).expand(*shape[:-2], 8, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captures_a_low_rank_matrix_whole(dtype: torch.dtype) -> None:
    gradient = (torch.randn(60, 5) @ torch.randn(5, 40)).to(dtype)
    assert captured(gradient, 5, "right", "randomized") == pytest.approx(gradient.float().norm().item(), rel=1e-2)


def test_products_of_large_float16_gradients_do_not_overflow() -> None:
    gradient = (torch.randn(600, 5) @ torch.randn(5, 400) * 2000).half()
    assert gradient.isfinite().all()
    assert captured(gradient, 5, "right", "randomized") == pytest.approx(gradient.float().norm().item(), rel=1e-2)


def test_captures_a_models_gradients_as_well_as_the_exact_subspace() -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    model(**tiny_batch(rows=8, length=64)).loss.backward()
    for p in model.model.layers.parameters():
        if p.dim() == 2:
            side = "right" if p.size(0) >= p.size(1) else "left"
            assert captured(p.grad, 16, side, "randomized") >= 0.99 * captured(p.grad, 16, side, "svd")


@pytest.mark.parametrize("method", ["randomized", "random"])
def test_is_the_same_whatever_dtype_new_tensors_have(method: str) -> None:
    gradient = torch.randn(60, 40).bfloat16()
    expected = leading_singular_vectors(gradient, 8, "right", method)
    with HalfPrecision("bf16-true").forward_context():  # as in a training step
        assert torch.get_default_dtype() == torch.bfloat16
        found = leading_singular_vectors(gradient, 8, "right", method)
    assert torch.equal(found, expected)


def test_a_weights_steps_are_counted_whatever_dtype_new_tensors_have() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GaLoreAdamW([weight])
    with HalfPrecision("bf16-true").forward_context():  # as in a script that sets the default dtype
        for _ in range(300):
            weight.grad = torch.ones(2, dtype=torch.float32)
            optimizer.step()
    assert optimizer.state[weight]["step"] == 300


def test_is_the_same_for_the_same_seed_alone() -> None:
    gradient = torch.randn(40, 30)
    one, again, other = (leading_singular_vectors(gradient, 4, "right", "randomized", seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_each_vectors_largest_entry_is_positive() -> None:
    gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    vectors = next(singular_vectors([find_subspace(gradient, 4, "right", "randomized")]))
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_directions_beyond_the_gradients_rank_follow_from_the_seed() -> None:
    """Not from rounding, in which processes on different machines differ."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    shuffled = gradient[torch.randperm(40, generator=generator)]  # the same right singular vectors, rounded otherwise
    one, other = (next(singular_vectors([find_subspace(g, 6, "right", "randomized")])) for g in (gradient, shuffled))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
