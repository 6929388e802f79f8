"""The largest eigenvalue alone, of `R` positive semi-definite operators at once: from below, and surely from above.

Sources: the Kato-Temple inequality (Parlett, "The Symmetric Eigenvalue Problem", section 10.5) for when to stop; Dixon
1983, "Estimating extremal eigenvalues and condition numbers of matrices", for the bound from random vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor

from gradguard.linalg.lanczos import krylov_spaces
from gradguard.linalg.operator import LinearOperator, normalise, random_unit


@dataclass(frozen=True)
class LargestEigenvalue:
    """`value`: `(R,)`, the Ritz value, at most the largest eigenvalue; `vector`: `(R, n)`; `residual`: `(R,)`,
    `|A v - value v|`, within which an eigenvalue lies; `error`: `(R,)`, the closer estimate
    `min(residual, residual^2 / gap)`; `iterations`; `converged`: `(R,)`, `error` below the tolerance."""

    value: Tensor
    vector: Tensor
    residual: Tensor
    error: Tensor
    iterations: int
    converged: Tensor


def largest_eigenvalue(
    operator: LinearOperator,
    *,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LargestEigenvalue:
    """The largest eigenvalue by Lanczos, to a relative accuracy of `tolerance`.

    An eigenvalue converges as the square of its vector: the steps end when `residual^2 / gap` is small enough, the gap
    being that to the second Ritz value, taken at its upper end. No Krylov method can rule out that its start had next
    to nothing of the leading eigenvector; so a given `start` `(R, n)` (the `vector` of an earlier call) is mixed with
    a random one, and for a sure bound there is `largest_eigenvalue_bound`.
    `max_iterations`: default `min(n, 300)`; running out is reported in `converged`, never raised.
    """
    n = operator.shape[-1]
    random = random_unit(operator, generator)
    first = random if start is None else normalise(start.to(random))[0] + 0.1 * random
    limit = min(n, max_iterations or 300)
    for space in krylov_spaces(operator, limit, start=first, check_every=1):
        values, rotation = torch.linalg.eigh(space.tridiagonal())
        residuals = (space.off_diagonal[:, -1:] * rotation[:, -1, :]).abs()
        value, residual = values[:, -1], residuals[:, -1]
        error = residual
        if values.shape[-1] > 1:
            gap = value - (values[:, -2] + residuals[:, -2])
            tiny = torch.finfo(gap.dtype).tiny
            error = torch.where(gap > residual, residual**2 / gap.clamp_min(tiny), residual)
        converged = error <= tolerance * value
        if bool(converged.all()):
            break
    vector = torch.einsum("rj,rjn->rn", rotation[:, :, -1], space.basis)
    return LargestEigenvalue(value, vector, residual, error, space.diagonal.shape[-1], converged)


def largest_eigenvalue_bound(
    operator: LinearOperator,
    *,
    probes: int = 8,
    steps: int = 0,
    confidence: float = 0.999,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Numbers `(R,)` that the largest eigenvalues lie below, each with probability `confidence`, whatever the spectrum.

    For Gaussian `u`, `u^T A^p u >= lambda_max^p (v^T u)^2`, and `(v^T u)^2` summed over `probes` is chi-squared. With
    `steps = 0` (`p = 1`) this is an estimate of the trace; every step adds two to `p = 2 steps + 1` and a product per
    probe. The bound is too high by at most `(n probes / quantile)^(1 / p)` or so.
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
