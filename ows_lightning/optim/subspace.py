"""The subspace that a gradient is projected onto: its leading singular vectors, exact or randomized, or a random one."""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["left", "right"]
SubspaceMethod = Literal["randomized", "svd", "random"]
RANK_TOLERANCE = 1e-5  # singular values below this part of the largest are rounding in float32
OVERSAMPLING = 16  # extra test vectors; Halko et al. (arXiv 0909.4061, section 4.2) find 5 to 10 enough in most cases


class Sketch(NamedTuple):
    """A randomized subspace, whose basis `singular_vectors` rotates."""

    basis: Tensor  # orthonormal columns (..., n, k), of the gradient's dtype: the leading vectors' span, and some more
    r_factor: Tensor  # R (..., k, k) of the QR decomposition that gave the basis, whose left singular vectors rotate it
    rank: int  # number of vectors asked for
    generator: torch.Generator  # gives the directions beyond the gradient's numerical rank


def find_subspace(gradient: Tensor, rank: int, side: Side, method: SubspaceMethod, seed: int = 0) -> Tensor | Sketch:
    """Finds the top r left (..., m, r) or right (..., n, r) singular vectors of a gradient (..., m, n), or nearly so.

    ``svd`` is exact (GaLore, arXiv 2403.03507); ``randomized`` is subspace iteration with one power iteration (Halko et al.,
    arXiv 0909.4061, algorithm 4.4), a few matrix products instead of a decomposition, and returns a sketch, which does not
    wait for the device; ``random`` takes the shape of the gradient alone, see ``random_subspace``. Every process and every
    resumed run finds the same by the same ``seed``. Leading dimensions are a batch (experts); the dtype is the gradient's.
    """
    if method == "random":
        return random_subspace(gradient if side == "right" else gradient.mT, rank, seed).contiguous()
    if method == "svd":
        # Never of the transposed gradient: moments that are kept depend on the vectors' signs, which are galore-torch's.
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        return (vh[..., :rank, :].mT if side == "right" else u[..., :rank]).to(gradient.dtype).contiguous()
    exact = gradient.float() if gradient.dtype == torch.float16 else gradient  # whose products would overflow
    matrix = exact if side == "right" else exact.mT
    generator = torch.Generator(matrix.device).manual_seed(seed)
    # The products run in the matrix's own dtype: no float32 copy of it is made.
    # All experts share it: a process with some of the experts finds the same subspaces as one that has them all.
    shape = matrix.size(-2), min(rank + OVERSAMPLING, *matrix.shape[-2:])
    test = torch.randn(shape, generator=generator, dtype=torch.float32, device=matrix.device)
    rows = _orthonormal(matrix.mT @ test.to(matrix.dtype)).to(matrix.dtype)
    columns = _orthonormal(matrix @ rows).to(matrix.dtype)
    basis, r_factor = torch.linalg.qr((matrix.mT @ columns).float())
    return Sketch(basis.to(gradient.dtype), r_factor, rank, generator)


def singular_vectors(sketches: Sequence[Sketch]) -> Iterator[Tensor]:
    """Rotates the bases of sketches: yields orthonormal columns, (..., n, r), float32, of each; waits once for the GPU."""
    # The small decompositions run on the CPU, since a GPU is no faster.
    r_factors = [sketch.r_factor for sketch in sketches]
    together = torch.cat([r_factor.flatten().to(r_factors[0].device) for r_factor in r_factors]).cpu()
    parts = together.split([r_factor.numel() for r_factor in r_factors])
    for (basis, r_factor, rank, generator), part in zip(sketches, parts, strict=True):
        # With A ~ C (A^T C)^T and A^T C = Q R, the left singular vectors of R rotate Q onto A's right ones, largest first.
        axes, values, _ = torch.linalg.svd(part.view(r_factor.shape))
        vectors = basis.float() @ axes[..., :rank].to(basis.device, non_blocking=basis.is_cuda)
        # Rounding differs with the number of processes and must not decide anything. So directions beyond the gradient's
        # numerical rank come from the generator, and each vector's largest entry is made positive, for moments that are kept.
        left_open = values[..., None, :rank] <= RANK_TOLERANCE * values[..., None, :1]
        if left_open.any():
            free = torch.randn(basis.size(-2), rank, generator=generator, dtype=torch.float32, device=basis.device)
            vectors = _orthonormal(torch.where(left_open.to(basis.device, non_blocking=basis.is_cuda), free, vectors))
        vectors = vectors.contiguous()  # QR's layout would not be read from shards again, and products round differently
        yield vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()


def derived_seed(*numbers: int) -> int:
    """A seed that follows from several numbers; other small numbers hardly ever give the same one."""
    return functools.reduce(lambda seed, number: 1_000_003 * seed + number, numbers) % 2**63


def random_subspace(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Returns an orthonormal basis of a random subspace, Q of a Gaussian's QR decomposition: the same wherever it is made.

    ``matrix``, of shape (..., m, n), gives the shape, dtype and device; all its matrices share the basis (..., n, r), r <= n.
    The Gaussian is drawn in float32 and decomposed on the CPU: devices round differently.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(matrix.size(-1), rank, generator=generator, dtype=torch.float32, device="cpu")
    exact = torch.promote_types(matrix.dtype, torch.float32)
    basis = torch.linalg.qr(gaussian.to(exact)).Q.to(matrix.dtype).contiguous()
    basis = basis.to(matrix.device, non_blocking=matrix.is_cuda)  # MPS would read it when it is gone
    return basis.expand(*matrix.shape[:-2], -1, -1)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns.float()).Q
