"""A packed difference gives every bit of a tensor back, and is small where training changed little."""

from __future__ import annotations

import zlib

import pytest
import torch

from ows_lightning.models.delta import compress, decompress

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.bool,
]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    """Of any two tensors, also where nothing is alike, and of zeros' signs, infinities, NaN and numbers that overflow."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(0)
    base, tensor = torch.randint(
        0, 2 if dtype == torch.bool else 256, (2, 31, 7 * size), generator=generator, dtype=torch.uint8
    )
    base, tensor = base.view(dtype), tensor.view(dtype)
    if dtype.is_floating_point and size > 1:
        base[0, :5] = tensor[1, :5] = torch.tensor(
            [0.0, -0.0, float("inf"), float("nan"), torch.finfo(dtype).max], dtype=dtype
        )
    assert same_bits(decompress(compress(tensor, base), base), tensor)
    assert same_bits(decompress(compress(tensor.T, base.T), base.T), tensor.T)
    assert same_bits(decompress(compress(tensor[0, 0], base[0, 0]), base[0, 0]), tensor[0, 0])


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.75), (torch.bfloat16, 0.45)])
def test_small_updates_take_little(dtype: torch.dtype, share: float) -> None:
    """An update of a hundredth leaves a float32 about 7 leading bits of its 23, and a bfloat16 all but one or two of its 7."""
    base = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    tensor = base + 0.01 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    base, tensor = base.to(dtype), tensor.to(dtype)
    packed = compress(tensor, base)
    assert packed.nbytes < share * tensor.nbytes
    assert packed.nbytes < 0.8 * len(zlib.compress(tensor.view(torch.uint8).numpy(), 9))


def test_damage_is_an_error() -> None:
    base = torch.zeros(64)
    packed = compress(torch.arange(64.0), base)
    with pytest.raises(zlib.error):
        decompress(packed[:-3].clone(), base)
    with pytest.raises(ValueError, match="reshape"):
        decompress(packed, base[1:])
