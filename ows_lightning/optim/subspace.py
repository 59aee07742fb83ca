"""The subspace that a gradient is projected onto: its leading singular vectors, exact or randomized, or a random one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]
Method = Literal["randomized", "svd", "random"]

NOISE = 1e-5  # singular values below this part of the largest are rounding in float32
OVERSAMPLING = 16  # extra test vectors; Halko et al. (arXiv 0909.4061, section 4.2) find 5 to 10 enough in most cases


def leading_singular_vectors(gradient: Tensor, rank: int, side: Side, method: Method, seed: int = 0) -> Tensor:
    """Returns the top-``rank`` left or right singular vectors of a gradient.

    Args:
        gradient: Gradient of shape (..., m, n), any float dtype; leading dimensions are a batch (experts).
        rank: Number of singular vectors r, smaller than the side's dimension.
        side: ``"left"`` spans the rows' dimension m, ``"right"`` the columns' dimension n.
        method: ``"svd"`` is exact (GaLore, arXiv 2403.03507); ``"randomized"`` is subspace iteration with one power iteration
            (Halko et al., arXiv 0909.4061, algorithm 4.4): a few matrix products instead of a decomposition; ``"random"``
            takes the shape of the gradient alone, see ``random_subspace``.
        seed: Seeds the random matrix, so that every process and every resumed run finds the same subspace.

    Returns:
        Orthonormal columns of shape (..., m, r) or (..., n, r), in the gradient's dtype.
    """
    dtype = gradient.dtype
    if method == "random":
        return random_subspace(gradient if side == "right" else gradient.mT, rank, seed).contiguous()
    if method == "svd":
        # Never of the transposed gradient: moments that are kept depend on the vectors' signs, which are galore-torch's.
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        vectors = vh[..., :rank, :].mT if side == "right" else u[..., :rank]
    else:
        gradient = gradient.float() if gradient.dtype == torch.float16 else gradient  # whose products would overflow
        vectors = _randomized(gradient if side == "right" else gradient.mT, rank, seed)
    return vectors.to(dtype).contiguous()


def random_subspace(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Returns an orthonormal basis of a random subspace, Q of a Gaussian's QR decomposition: the same wherever it is made.

    Args:
        matrix: Any tensor of shape (..., m, n), for its shape, dtype and device; all its matrices share the basis.
        rank: Number of columns r, at most n.
        seed: Seeds the Gaussian, which is drawn in float32 on the CPU.

    Returns:
        Orthonormal columns, of shape (..., n, r), in the matrix's dtype.
    """
    gaussian = torch.randn(matrix.size(-1), rank, generator=torch.Generator().manual_seed(seed))
    exact = torch.promote_types(matrix.dtype, torch.float32)
    basis = torch.linalg.qr(gaussian.to(matrix.device, exact, non_blocking=True)).Q.to(matrix.dtype).contiguous()
    return basis.expand(*matrix.shape[:-2], -1, -1)


def _randomized(matrix: Tensor, rank: int, seed: int) -> Tensor:
    m, n = matrix.shape[-2:]
    generator = torch.Generator(matrix.device).manual_seed(seed)
    # The products run in the matrix's own dtype: no float32 copy of it is made.
    # All experts share it: a process with some of the experts finds the same subspaces as one that has them all.
    test = torch.randn(m, min(rank + OVERSAMPLING, m, n), generator=generator, device=matrix.device)
    rows = _orthonormal(matrix.mT @ test.to(matrix.dtype)).to(matrix.dtype)
    columns = _orthonormal(matrix @ rows).to(matrix.dtype)
    # With A ~ C (A^T C)^T and A^T C = Q R, the left singular vectors of R turn Q onto A's right ones, largest first.
    basis, triangle = torch.linalg.qr((matrix.mT @ columns).float())
    # A small decomposition, by the CPU: a GPU is no faster, and would be waited for here and once more for what is left open.
    axes, values, _ = torch.linalg.svd(triangle.cpu())
    vectors = basis @ axes[..., :rank].to(matrix.device, non_blocking=True)
    # Rounding differs with the number of processes and must not decide anything. So directions beyond the gradient's numerical
    # rank come from the generator, and the largest entry of each vector is made positive: moments that are kept depend on it.
    left_open = values[..., None, :rank] <= NOISE * values[..., None, :1]
    if left_open.any():
        free = torch.randn(n, rank, generator=generator, device=matrix.device)
        vectors = _orthonormal(torch.where(left_open.to(matrix.device, non_blocking=True), free, vectors))
    return vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns.float()).Q
