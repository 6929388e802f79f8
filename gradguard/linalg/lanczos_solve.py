"""Linear systems with `R` positive semi-definite operators at once: conjugate gradients in exact arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.linalg.lanczos import krylov_spaces
from gradguard.linalg.lsmr import LeastSquares
from gradguard.linalg.operator import LinearOperator, safe_inverse


def lanczos_solve(
    operator: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    check_every: int = 10,
) -> LeastSquares:
    """`(A + damping)^{-1} b` by Lanczos from `b`, fully reorthogonalised; of least norm where `A` is singular.

    The iterates are those of conjugate gradients. Their norms grow towards the solution's, so an unfinished solution is
    a short one. Reorthogonalisation keeps the number of steps at `n` at most, however ill-conditioned `A` is, and takes
    `R n` elements per step.

    Args:
        operator: `R` positive semi-definite maps `A`, shape `(R, n, n)`.
        b: The right-hand sides, shape `(R, n)`; in the range of `A` if `damping` is 0.
        damping: Added to every eigenvalue; not negative.
        tolerance: Stop when `|b - (A + damping) x| / |b|` is below it. Default: 10 times the dtype's rounding.
        max_iterations: Default `n`.
        check_every: Steps between two looks at the residual.

    Returns:
        The solutions `(R, n)`. `residual` is the ratio above. Running out of iterations is reported in `converged`,
        never raised.
    """
    tolerance = 10 * torch.finfo(operator.dtype).eps if tolerance is None else tolerance
    length = torch.linalg.vector_norm(b, dim=-1)
    limit = min(operator.shape[-1], max_iterations or operator.shape[-1])
    for space in krylov_spaces(operator, limit, start=b, check_every=check_every):
        # In the tridiagonal's eigenbasis; what is at rounding level is where an exhausted space was filled with zeros.
        values, rotation = torch.linalg.eigh(space.tridiagonal())
        shifted = values + damping
        cut = torch.finfo(values.dtype).eps * values.shape[-1] * shifted[:, -1:].abs()
        coefficients = torch.where(shifted > cut, safe_inverse(shifted), torch.zeros_like(shifted)) * rotation[:, 0, :]
        y = length[:, None] * torch.einsum("rij,rj->ri", rotation, coefficients)
        residual = (space.off_diagonal[:, -1] * y[:, -1]).abs() * safe_inverse(length)
        if bool((residual <= tolerance).all()):
            break
    solution = torch.einsum("rk,rkn->rn", y, space.basis)
    return LeastSquares(solution, residual, space.diagonal.shape[-1], residual <= tolerance)
