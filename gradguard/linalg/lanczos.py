"""Lanczos for `R` symmetric operators at once, fully reorthogonalised, with residuals.

Sources: Paige 1980 and Parlett, "The Symmetric Eigenvalue Problem", chapter 13. Nothing inside the iteration
reads a number back from the device; convergence is looked at every `check_every` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.linalg.operator import LinearOperator, grown, normalise, orthogonalise, random_unit


@dataclass(frozen=True)
class KrylovSpace:
    """What `k` Lanczos steps leave: `A Q = Q T + residual`, `T` tridiagonal.

    Args:
        diagonal: The diagonal of `T`, shape `(R, k)`.
        off_diagonal: Shape `(R, k)`: the diagonal beside it, and in the last place the norm of the residual.
        basis: The rows of `Q^T`, shape `(R, k, n)`, orthonormal. Rows after the space is exhausted are zero.
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor

    def tridiagonal(self) -> Tensor:
        """The tridiagonal matrix `T`.

        Returns:
            Shape `(R, k, k)`.
        """
        inner = self.off_diagonal[:, :-1]
        return torch.diag_embed(self.diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs, largest first.

    Args:
        values: Ritz values, shape `(R, k)`.
        vectors: Their vectors of norm 1, shape `(R, k, n)`.
        residual: `|A v - value v|`, shape `(R, k)`. An eigenvalue lies within `residual` of each value.
        iterations: Lanczos steps taken.
        converged: Shape `(R,)`: whether all residuals of a problem are below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


def krylov_space(
    operator: LinearOperator, steps: int, *, start: Tensor | None = None, generator: torch.Generator | None = None
) -> KrylovSpace:
    """The Krylov space of `steps` Lanczos steps.

    Args:
        operator: `R` symmetric maps, shape `(R, n, n)`.
        steps: Number of steps, at most `n`.
        start: First vectors, shape `(R, n)`, of any length. Default: random.
        generator: Draws the random start.

    Returns:
        The space, with `k = steps`.
    """
    return Lanczos(operator, steps, start, generator).advance(steps).space()


def krylov_spaces(
    operator: LinearOperator,
    limit: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    check_every: int = 5,
    first: int = 1,
) -> Iterator[KrylovSpace]:
    """One Krylov space as it grows to `limit` steps.

    Args:
        operator: `R` symmetric maps, shape `(R, n, n)`.
        limit: Largest number of steps, at most `n`.
        start: First vectors, shape `(R, n)`, of any length. Default: random.
        generator: Draws the random start.
        check_every: Steps between two spaces that are shown.
        first: Number of steps before the first one is shown, at least.

    Yields:
        The space so far: the same one, with more steps each time.
    """
    lanczos = Lanczos(operator, limit, start, generator)
    while lanczos.steps < limit:
        lanczos.advance(min(limit, max(lanczos.steps + check_every, first)) - lanczos.steps)
        yield lanczos.space()


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

    Args:
        operator: The maps `A`, shape `(R, n, n)`.
        count: Number of pairs per problem; at most `n` are returned.
        tolerance: Stop when every residual is below `tolerance * largest value`.
        max_iterations: Lanczos steps, at most `n`. Default `min(n, max(20 count, 300))`.
        start: First vectors, shape `(R, n)`, for instance the vectors of an earlier call. Default: random.
        generator: Draws the random start.
        check_every: Steps between two looks at the residuals.

    Returns:
        The pairs, largest first. Running out of iterations is reported in `converged`, never raised.
    """
    return extreme_eigenpairs(
        operator,
        count,
        0,
        tolerance=tolerance,
        max_iterations=max_iterations,
        start=start,
        generator=generator,
        check_every=check_every,
    )


def extreme_eigenpairs(
    operator: LinearOperator,
    leading: int,
    smallest: int,
    *,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    check_every: int = 5,
) -> Eigenpairs:
    """The leading and the smallest eigenpairs of `R` positive semi-definite operators, from one Krylov space.

    The small end converges slowly where eigenvalues cluster at 0, and a Ritz value is never below the smallest
    eigenvalue: read `residual`. A repeated eigenvalue is found once.

    Args:
        operator: The maps `A`, shape `(R, n, n)`.
        leading: Number of pairs at the large end.
        smallest: Number of pairs at the small end.
        tolerance: Stop when every residual is below `tolerance * largest value`, at both ends.
        max_iterations: Lanczos steps, at most `n`. Default `min(n, max(20 (leading + smallest), 300))`.
        start: First vectors, shape `(R, n)`. Default: random.
        generator: Draws the random start.
        check_every: Steps between two looks at the residuals.

    Returns:
        The pairs, largest first: the leading ones, then the smallest ones. Running out of iterations is reported in
        `converged`, never raised.
    """
    n = operator.shape[-1]
    leading, smallest = min(leading, n), min(smallest, n - min(leading, n))
    count = leading + smallest
    limit = min(n, max(count, max_iterations or max(20 * count, 300)))
    spaces = krylov_spaces(operator, limit, start=start, generator=generator, check_every=check_every, first=count)
    for space in spaces:
        tridiagonal, empty = space.tridiagonal(), None
        if smallest:
            # An exhausted space is filled up with zeros, which would pose as the smallest eigenvalues.
            empty = torch.linalg.vector_norm(space.basis, dim=-1) == 0
            between = space.diagonal.sum(-1, keepdim=True) / (~empty).sum(-1, keepdim=True)
            tridiagonal = tridiagonal + torch.diag_embed(empty * between)
        values, rotation = torch.linalg.eigh(tridiagonal)
        steps = values.shape[-1]
        chosen = torch.arange(steps - 1, -1, -1, device=values.device)
        chosen = torch.cat([chosen[:leading], chosen[steps - smallest :]])
        largest, values, rotation = values[:, -1:], values[:, chosen], rotation[:, :, chosen]
        residual = (space.off_diagonal[:, -1:] * rotation[:, -1, :]).abs()
        if empty is not None:
            residual = torch.where((rotation**2 * empty[..., None]).sum(1) > 0.5, torch.inf, residual)
        # A Krylov space that is exhausted early has a residual of zero: the start vector had no more to give.
        converged = (residual <= tolerance * largest).all(dim=-1)
        if bool(converged.all()):
            break
    vectors = torch.einsum("rjk,rjn->rkn", rotation, space.basis)
    return Eigenpairs(values, vectors, residual, steps, converged)


class Lanczos:
    """The iteration: state that can be advanced a few steps at a time.

    Args:
        operator: `R` symmetric maps, shape `(R, n, n)`.
        limit: Largest number of steps.
        start: First vectors, shape `(R, n)`; random if `None`.
        generator: Draws the random start.
    """

    def __init__(
        self, operator: LinearOperator, limit: int, start: Tensor | None, generator: torch.Generator | None
    ) -> None:
        rows, _, n = operator.shape
        self.operator = operator
        self.limit = limit
        self.steps = 0
        # Grows as it fills: most calls end long before their limit.
        self.basis = torch.zeros(rows, min(limit, 16), n, dtype=operator.dtype, device=operator.device)
        self.diagonal = torch.zeros(rows, limit, dtype=operator.dtype, device=operator.device)
        self.off_diagonal = torch.zeros_like(self.diagonal)
        self.next = random_unit(operator, generator) if start is None else normalise(start.to(operator.like))[0]

    def advance(self, count: int) -> Lanczos:
        """Take `count` steps more.

        Args:
            count: Number of steps; `steps + count` must be at most `limit`.

        Returns:
            This object.
        """
        for k in range(self.steps, self.steps + count):
            if k == self.basis.shape[1]:
                self.basis = grown(self.basis, self.limit)
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

    def keep(self, rows: Tensor) -> None:
        """Leave problems out of the following steps.

        Args:
            rows: The problems to keep, as indices. The operator must have `restrict`.
        """
        assert self.operator.restrict is not None
        self.operator = self.operator.restrict(rows)
        self.basis, self.next = self.basis[rows], self.next[rows]
        self.diagonal, self.off_diagonal = self.diagonal[rows], self.off_diagonal[rows]

    def space(self) -> KrylovSpace:
        """What the steps so far leave."""
        k = self.steps
        return KrylovSpace(self.diagonal[:, :k], self.off_diagonal[:, :k], self.basis[:, :k])
