"""Least squares with matrices that are small enough to be formed."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.linalg.lsmr import LeastSquares


def dense_least_squares(matrix: Tensor, b: Tensor, *, damping: float | Tensor = 0.0) -> LeastSquares:
    """Minimise `|A x - b|^2 + damping^2 |x|^2` for `R` matrices; without damping the solution of least norm.

    Singular values below the rounding of the largest count as zero.

    Args:
        matrix: The matrices `A`, shape `(R, m, n)`, tall or wide.
        b: The right-hand sides, shape `(R, m)`.
        damping: A number, or one per problem `(R,)`; not negative.

    Returns:
        The solutions `(R, n)`. `residual` is the normal equations' residual relative to `|A| |b|`; `iterations` is 0
        and `converged` all true.
    """
    damping = torch.as_tensor(damping, dtype=matrix.dtype, device=matrix.device).expand(len(matrix))[:, None]
    # QR first, so that the decomposition that costs is n x n; on A itself, not A^T A, which would halve the digits.
    q, r = torch.linalg.qr(matrix)
    left, singular, right = torch.linalg.svd(r, full_matrices=False)
    cut = torch.finfo(singular.dtype).eps * max(matrix.shape[-2:]) * singular[:, :1]
    gain = torch.where(singular > cut, singular / (singular**2 + damping**2), torch.zeros_like(singular))
    image = torch.einsum("rmj,rm->rj", q, b)
    solution = torch.einsum("rkn,rk->rn", right, gain * torch.einsum("rjk,rj->rk", left, image))
    remainder = b - torch.einsum("rmn,rn->rm", matrix, solution)
    normal = torch.einsum("rmn,rm->rn", matrix, remainder) - damping**2 * solution
    scale = singular[:, 0] * torch.linalg.vector_norm(b, dim=-1)
    residual = torch.linalg.vector_norm(normal, dim=-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return LeastSquares(solution, residual, 0, torch.ones_like(residual, dtype=torch.bool))
