"""LSMR for `R` least-squares problems at once.

Source: Fong & Saunders 2011, "LSMR: an iterative algorithm for sparse least-squares problems", section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.linalg.operator import LinearOperator, grown, normalise, orthogonalise, safe_inverse


@dataclass(frozen=True)
class LeastSquares:
    """A solution and how it was reached.

    Args:
        solution: Shape `(R, n)`.
        residual: Shape `(R,)`. The normal equations' residual `|A^T (b - A x) - damping^2 x| / (|A| |b - A x|)` or,
            where the system is consistent, `|b - A x| / |b|`, whichever is smaller.
        iterations: Number of iterations.
        converged: Shape `(R,)`: whether the residual is below the tolerance.
    """

    solution: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


def lsmr(
    operator: LinearOperator,
    b: Tensor,
    *,
    damping: float | Tensor = 0.0,
    tolerance: float | None = None,
    reduction: float | Tensor = 0.0,
    max_iterations: int | None = None,
    reorthogonalise: bool = True,
    check_every: int = 10,
) -> LeastSquares:
    """Minimise `|A x - b|^2 + damping^2 |x|^2`; without damping the solution of least norm.

    Args:
        operator: The `R` maps `A`, of shape `(R, m, n)`.
        b: The right-hand sides, shape `(R, m)`.
        damping: A number, or one per problem `(R,)`; not negative.
        tolerance: On the residual of `LeastSquares`. Default: 100 times the dtype's rounding.
        reduction: A number or `(R,)`. Stop as well where the normal equations' residual is this share of what it was at
            `x = 0`.
        max_iterations: Default `n` with `reorthogonalise`, else `2 n`.
        reorthogonalise: Keep the `n`-vectors and orthogonalise against them (`iterations * R * n` elements). An
            ill-conditioned problem then ends after at most `n` steps, as it would in exact arithmetic.
        check_every: Iterations between two looks at the residual.

    Returns:
        The solutions `(R, n)` and how they were reached. Running out of iterations is reported in `converged`, never
        raised.
    """
    rows, _, n = operator.shape
    tolerance = 100 * torch.finfo(operator.dtype).eps if tolerance is None else tolerance
    limit = max_iterations or (n if reorthogonalise else 2 * n)
    damping = torch.as_tensor(damping, dtype=operator.dtype, device=operator.device).expand(rows)

    u, beta = normalise(b)
    v, alpha = normalise(operator.rmatvec(u))
    b_norm = beta.clone()
    basis = v[:, None].repeat(1, min(limit, 16) if reorthogonalise else 1, 1)  # grows as it fills

    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    zetabar, alphabar = alpha * beta, alpha.clone()
    enough = reduction * zetabar
    rho, rhobar, cbar, sbar = one, one, one, zero
    h, hbar, x = v, torch.zeros_like(v), torch.zeros_like(v)
    # For the estimates of |r| and |A|, as in the paper's section 5.
    betadd, betad, rhodold, tautildeold, thetatilde, zeta, d = beta, zero, one, zero, zero, zero, zero
    norm_a2 = alpha**2
    done = (alpha * beta) == 0
    residual = torch.where(done, zero, one)

    iteration = 0
    while iteration < limit:
        iteration += 1
        # Golub-Kahan bidiagonalisation.
        u, beta = normalise(operator.matvec(v) - alpha[:, None] * u)
        w = operator.rmatvec(u) - beta[:, None] * v
        if reorthogonalise:
            w = orthogonalise(w, basis[:, :iteration])
        v, alpha = normalise(w)
        if reorthogonalise and iteration < limit:
            if iteration == basis.shape[1]:
                basis = grown(basis, limit)
            basis[:, iteration] = v

        # Rotations: damping, then the two QR factorisations.
        alphahat = torch.hypot(alphabar, damping)
        chat, shat = alphabar * safe_inverse(alphahat), damping * safe_inverse(alphahat)
        rhoold = rho
        rho = torch.hypot(alphahat, beta)
        c, s = alphahat * safe_inverse(rho), beta * safe_inverse(rho)
        thetanew, alphabar = s * alpha, c * alpha
        rhobarold, zetaold = rhobar, zeta
        thetabar, rhotemp = sbar * rho, cbar * rho
        rhobar = torch.hypot(rhotemp, thetanew)
        cbar, sbar = rhotemp * safe_inverse(rhobar), thetanew * safe_inverse(rhobar)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar

        # A problem that has ended keeps its solution; the others move.
        step = torch.where(done, zero, zeta * safe_inverse(rho * rhobar))
        hbar = h - (thetabar * rho * safe_inverse(rhoold * rhobarold))[:, None] * hbar
        x = x + step[:, None] * hbar
        h = v - (thetanew * safe_inverse(rho))[:, None] * h

        # The residual |b - A x| (with damping: of the extended system).
        betaacute, betacheck = chat * betadd, -shat * betadd
        betahat, betadd = c * betaacute, -s * betaacute
        thetatildeold = thetatilde
        rhotildeold = torch.hypot(rhodold, thetabar)
        ctildeold, stildeold = rhodold * safe_inverse(rhotildeold), thetabar * safe_inverse(rhotildeold)
        thetatilde, rhodold = stildeold * rhobar, ctildeold * rhobar
        betad = -stildeold * betad + ctildeold * betahat
        tautildeold = (zetaold - thetatildeold * tautildeold) * safe_inverse(rhotildeold)
        taud = (zeta - thetatilde * tautildeold) * safe_inverse(rhodold)
        d = d + betacheck**2
        norm_r = torch.sqrt(d + (betad - taud) ** 2 + betadd**2)
        norm_a2 = norm_a2 + beta**2
        norm_a = torch.sqrt(norm_a2)
        norm_a2 = norm_a2 + alpha**2

        normal = zetabar.abs() * safe_inverse(norm_a * norm_r)
        consistent = norm_r * safe_inverse(b_norm)
        now = torch.minimum(normal, consistent)
        residual = torch.where(done, residual, now)
        done = done | (now <= tolerance) | (zetabar.abs() <= enough) | (alpha <= torch.finfo(alpha.dtype).eps * norm_a)
        if iteration % check_every == 0 and bool(done.all()):
            break
    return LeastSquares(x, residual, iteration, (residual <= tolerance) | done)
