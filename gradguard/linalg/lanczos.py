"""Lanczos for `R` symmetric operators at once, fully reorthogonalised, with residuals.

Sources: Paige 1980 and Parlett, "The Symmetric Eigenvalue Problem", chapter 13. Nothing inside the iteration
reads a number back from the device; convergence is looked at every `check_every` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.linalg.operator import LinearOperator, normalise, orthogonalise, random_unit


@dataclass(frozen=True)
class KrylovSpace:
    """What `k` Lanczos steps leave: `A Q = Q T + residual`, `T` tridiagonal.

    `diagonal`: `(R, k)`; `off_diagonal`: `(R, k)`, the last entry being the residual's norm;
    `basis`: `(R, k, n)`, orthonormal rows.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor

    def tridiagonal(self) -> Tensor:
        """`T`: shape `(R, k, k)`."""
        inner = self.off_diagonal[:, :-1]
        return torch.diag_embed(self.diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs, largest first.

    `values`: `(R, k)`; `vectors`: `(R, k, n)`; `residual`: `(R, k)`, `|A v - value v|`, so that an eigenvalue lies
    within `residual` of each value; `iterations`: Lanczos steps; `converged`: `(R,)`.
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


def krylov_space(
    operator: LinearOperator, steps: int, *, start: Tensor | None = None, generator: torch.Generator | None = None
) -> KrylovSpace:
    """`steps` Lanczos steps from `start` `(R, n)` (random by default)."""
    return _Lanczos(operator, steps, start, generator).advance(steps).space()


def largest_eigenpairs(
    operator: LinearOperator,
    count: int = 1,
    *,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    check_every: int = 5,
) -> Eigenpairs:
    """The `count` leading eigenpairs of `R` positive semi-definite operators.

    `tolerance`: stop when every residual is below `tolerance * largest value`.
    `max_iterations`: Lanczos steps, at most `n` (default `min(n, max(20 count, 300))`); running out is reported in
    `converged`, never raised. `start`: `(R, n)`, for instance the vectors of an earlier call.
    """
    n = operator.shape[-1]
    count = min(count, n)
    limit = min(n, max_iterations or max(20 * count, 300))
    lanczos = _Lanczos(operator, limit, start, generator)
    while True:
        lanczos.advance(min(limit, max(lanczos.steps + check_every, count)) - lanczos.steps)
        space = lanczos.space()
        values, rotation = torch.linalg.eigh(space.tridiagonal())
        values, rotation = values.flip(-1)[:, :count], rotation.flip(-1)[:, :, :count]
        residual = (space.off_diagonal[:, -1:] * rotation[:, -1, :]).abs()
        # A Krylov space that is exhausted early has a residual of zero: the start vector had no more to give.
        converged = (residual <= tolerance * values[:, :1]).all(dim=-1)
        if lanczos.steps == limit or bool(converged.all()):
            vectors = torch.einsum("rjk,rjn->rkn", rotation, space.basis)
            return Eigenpairs(values, vectors, residual, lanczos.steps, converged)


class _Lanczos:
    """The iteration: state that can be advanced a few steps at a time."""

    def __init__(
        self, operator: LinearOperator, limit: int, start: Tensor | None, generator: torch.Generator | None
    ) -> None:
        rows, _, n = operator.shape
        self.operator = operator
        self.steps = 0
        self.basis = torch.zeros(rows, limit, n, dtype=operator.dtype, device=operator.device)
        self.diagonal = torch.zeros(rows, limit, dtype=operator.dtype, device=operator.device)
        self.off_diagonal = torch.zeros_like(self.diagonal)
        self.next = random_unit(operator, generator) if start is None else normalise(start.to(operator.like))[0]

    def advance(self, count: int) -> _Lanczos:
        for k in range(self.steps, self.steps + count):
            q = self.next
            self.basis[:, k] = q
            w = self.operator.matvec(q)
            self.diagonal[:, k] = (w * q).sum(-1)
            scale = torch.linalg.vector_norm(w, dim=-1)
            # Orthogonalising against the whole basis subsumes the three-term recurrence.
            self.next, beta = normalise(orthogonalise(w, self.basis[:, : k + 1]))
            # Below rounding the remainder is noise, and the Krylov space is invariant: stop it with zeros.
            alive = beta > 10 * torch.finfo(w.dtype).eps * scale
            self.next = self.next * alive[:, None]
            self.off_diagonal[:, k] = beta * alive
        self.steps += count
        return self

    def space(self) -> KrylovSpace:
        k = self.steps
        return KrylovSpace(self.diagonal[:, :k], self.off_diagonal[:, :k], self.basis[:, :k])
