"""The largest eigenvalue alone, of `R` positive semi-definite operators at once, from below and, surely, from above.

Sources: Hochstenbach 2013, "Probabilistic upper bounds for the matrix two-norm" (J. Sci. Comput. 57), for the bound
that comes with Lanczos; Dixon 1983, "Estimating extremal eigenvalues and condition numbers of matrices", for the one
that needs no iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from gradguard.linalg.lanczos import KrylovSpace, Lanczos
from gradguard.linalg.operator import LinearOperator, normalise, random_unit

#: The part of a warm start that is random. What is sure does not depend on it, nor does the room found.
_RANDOM_PART = 0.3


@dataclass(frozen=True)
class LargestEigenvalue:
    """The largest eigenvalue of each problem, and how surely it is known.

    Args:
        value: The Ritz value, shape `(R,)`; at most the largest eigenvalue.
        upper: Shape `(R,)`: the largest eigenvalue is below it with the confidence asked for.
        vector: The Ritz vector, shape `(R, n)`.
        residual: `|A v - value v|`, shape `(R,)`.
        iterations: Lanczos steps taken, of the problem that took most.
        converged: Shape `(R,)`: whether `upper` is within the tolerance of `value`.
    """

    value: Tensor
    upper: Tensor
    vector: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


def largest_eigenvalue(
    operator: LinearOperator,
    *,
    tolerance: float = 0.1,
    confidence: float | None = 0.999,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LargestEigenvalue:
    """The largest eigenvalue by Lanczos, until it is surely within a share `tolerance` of the Ritz value.

    A residual tells that an eigenvalue is near, not that it is the largest. But a random start has its share of the
    leading eigenvector: less than `q / n` of its square with probability `1 - confidence` only (`q` a quantile of
    chi-squared). What Lanczos has seen leaves room for so much at an eigenvalue `l` only while
    `sum_j p_j(l)^2 <= n / q`, where the `p_j` are the Lanczos polynomials, and these grow fast beyond the Ritz values
    (Hochstenbach 2013). The Ritz value itself is much closer: where the room is a tenth, mostly to 1e-4.

    Args:
        operator: `R` positive semi-definite maps, shape `(R, n, n)`.
        tolerance: Stop when `upper - value` is at most this share of `value`.
        confidence: Probability with which `upper` holds, in `(0, 1)`. `None`: `upper = value + residual`. An eigenvalue
            is surely near that, but it need not be the largest. That takes fewer steps, far fewer from a good start.
        max_iterations: Default `min(n, 300)`.
        start: Shape `(R, n)`, the `vector` of an earlier call. A random part is mixed in, for which the argument above
            holds too.
        random: Uniform directions for the random parts, shape `(R, n)`. Default: drawn from `generator`.
        generator: Draws them.

    Returns:
        The values and bounds. Running out of iterations is reported in `converged`, never raised: `upper` still holds.
    """
    n = operator.shape[-1]
    first = random_unit(operator, generator) if random is None else normalise(random.to(operator.like))[0]
    length = torch.ones(len(first), dtype=torch.float64)  # of the start, in units of its random part
    if start is not None:
        first, length = normalise(normalise(start.to(first))[0] / _RANDOM_PART + first)
    limit = min(n, max_iterations or 300)
    lanczos, going = Lanczos(operator, limit, first, None), torch.arange(len(first))
    room = np.ones(0) if confidence is None else n / chi2.ppf(1 - confidence, 1) * length.double().cpu().numpy() ** 2
    found: list[tuple[Tensor, LargestEigenvalue]] = []
    while len(going):
        space = lanczos.advance(1).space()
        # Small numbers, read back once per step: on the device each of their operations would cost as much as all here.
        diagonal, off_diagonal = torch.stack([space.diagonal, space.off_diagonal]).double().cpu().numpy()
        values, rotation = np.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
        value = values[:, -1]
        if confidence is None:
            upper = value + off_diagonal[:, -1] * np.abs(rotation[:, -1, -1])
        else:
            rounding = float(torch.finfo(operator.dtype).eps)
            upper = _upper(diagonal, off_diagonal, value, room[going.numpy()], tolerance, rounding)
        converged = upper - value <= tolerance * np.abs(value)
        ended = converged | (lanczos.steps == limit)
        if ended.all() or (operator.restrict is not None and 2 * ended.sum() >= len(ended)):
            rows = np.flatnonzero(ended)
            some = _result(space, rows, value, upper, rotation[:, :, -1], converged)
            found.append((going[torch.from_numpy(rows)], some))
            left = torch.from_numpy(np.flatnonzero(~ended))
            going = going[left]
            if len(left):
                lanczos.keep(left.to(operator.device))
    order = torch.cat([rows for rows, _ in found]).argsort().to(operator.device)
    last = found[-1][1]
    merged: dict[str, Any] = {
        name: torch.cat([vars(part)[name] for _, part in found])[order]
        for name, column in vars(last).items()
        if isinstance(column, Tensor)
    }
    return replace(last, **merged)


def _result(
    space: KrylovSpace,
    rows: np.ndarray,
    value: np.ndarray,
    upper: np.ndarray,
    leading: np.ndarray,
    converged: np.ndarray,
) -> LargestEigenvalue:
    """Of the problems `rows`. `leading`: `(R, k)`, the leading eigenvectors of the tridiagonals."""
    chosen = torch.from_numpy(rows).to(space.basis.device)
    weights = torch.from_numpy(leading[rows]).to(space.basis)
    return LargestEigenvalue(
        value=torch.from_numpy(value[rows]).to(space.basis),
        upper=torch.from_numpy(upper[rows]).to(space.basis),
        vector=torch.einsum("rj,rjn->rn", weights, space.basis[chosen]),
        residual=(space.off_diagonal[chosen, -1] * weights[:, -1]).abs(),
        iterations=space.diagonal.shape[-1],
        converged=torch.from_numpy(converged[rows]).to(space.basis.device),
    )


def _tridiagonal(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """`(R, k, k)` from `(R, k)` each, the last off-diagonal left out."""
    steps = np.arange(diagonal.shape[1])
    matrix = np.zeros((*diagonal.shape, len(steps)))
    matrix[:, steps, steps] = diagonal
    matrix[:, steps[1:], steps[:-1]] = matrix[:, steps[:-1], steps[1:]] = off_diagonal[:, :-1]
    return matrix


def _upper(
    diagonal: np.ndarray,
    off_diagonal: np.ndarray,
    value: np.ndarray,
    room: np.ndarray,
    tolerance: float,
    rounding: float,
) -> np.ndarray:
    """The least `l` above `value` `(R,)`, to a hundredth of the tolerance, with `sum_j p_j(l)^2 > room`."""
    # Below rounding an off-diagonal says that the space is exhausted, and leaves no room for anything.
    off_diagonal = np.maximum(off_diagonal, rounding * np.abs(value)[:, None] + np.finfo(np.float64).tiny)

    def exceeded(shares: np.ndarray) -> np.ndarray:
        """`(R, G)`: whether there is no room at `value * (1 + shares)`."""
        at = value[:, None] * (1 + shares)
        before, now = np.zeros_like(at), np.ones_like(at)
        total, coupling = np.ones_like(at), np.zeros((len(at), 1))
        for k in range(diagonal.shape[1]):
            following = ((at - diagonal[:, k, None]) * now - coupling * before) / off_diagonal[:, k, None]
            before, now = now, np.clip(following, -1e100, 1e100)
            coupling = off_diagonal[:, k, None]
            total = total + now**2
        return total > room[:, None]

    low, high = np.zeros_like(value), np.full_like(value, max(tolerance, 1e-6))
    while not (done := exceeded(high[:, None])[:, 0] | (value <= 0)).all():
        low, high = np.where(done, low, high), np.where(done, high, 4 * high)
    steps = np.linspace(0, 1, 17)
    for _ in range(2):
        grid = low[:, None] + (high - low)[:, None] * steps
        place = np.argmax(exceeded(grid)[:, 1:], axis=1) + 1
        rows = np.arange(len(value))
        low, high = grid[rows, place - 1], grid[rows, place]
    return value * (1 + high + 4 * rounding)


def largest_eigenvalue_bound(
    operator: LinearOperator,
    *,
    probes: int = 8,
    steps: int = 0,
    confidence: float = 0.999,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An upper bound of each largest eigenvalue that holds with probability `confidence`, whatever the spectrum.

    For Gaussian `u`, `u^T A^p u >= lambda_max^p (v^T u)^2`, and `(v^T u)^2` summed over `probes` is chi-squared. With
    `steps = 0` (`p = 1`) this is an estimate of the trace; every step adds two to `p = 2 steps + 1` and a product per
    probe. The bound is too high by at most `(n probes / quantile)^(1 / p)` or so (Dixon 1983).

    Args:
        operator: `R` positive semi-definite maps, shape `(R, n, n)`.
        probes: Number of random vectors per problem.
        steps: Power iterations per probe.
        confidence: Probability with which each bound holds, in `(0, 1)`.
        generator: Draws the probes.

    Returns:
        Shape `(R,)`.
    """
    rows, _, n = operator.shape
    logs = []
    for _ in range(probes):
        u = torch.randn(rows, n, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
        u, length = normalise(u)
        log = 2 * length.double().log()
        for _ in range(steps):
            u, growth = normalise(operator.matvec(u))
            log = log + 2 * growth.double().log()
        logs.append(log + (u * operator.matvec(u)).sum(-1).double().clamp_min(0).log())
    total = torch.logsumexp(torch.stack(logs), dim=0)
    return ((total - math.log(chi2.ppf(1 - confidence, probes))) / (2 * steps + 1)).exp().to(operator.dtype)
