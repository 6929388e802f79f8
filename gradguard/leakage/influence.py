"""The inversion influence function: how far a perturbation of the gradient moves a perfect attacker's picture.

Source: Zhang et al. 2023, "Understanding Deep Gradient Leakage via Inversion Influence Functions" (I2F).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.gradients import flatten
from gradguard.jacobian import InputJacobian
from gradguard.linalg import dense_least_squares, largest_eigenpairs, lsmr

#: `J` is formed where it takes at most this many elements (256 MiB in float64) ...
DENSE_ELEMENTS = 2**25
#: ... and at most this many rows: beyond, a few hundred products are cheaper than a factorisation.
DENSE_SIZE = 1024


@dataclass(frozen=True)
class Influence:
    """`R` predictions: one per example, or one for the joint operator.

    `value`: `(R,)`, `I(delta) = |displacement|`, in input units (Euclidean norm over the problem's inputs);
    `displacement`: shape of the inputs, how the reconstruction moves: `x_hat ~ x + displacement`;
    `residual`: `(R,)`, the least-squares solver's own (see `linalg.LeastSquares`); `iterations`; `converged`: `(R,)`.
    """

    value: Tensor
    displacement: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


@dataclass(frozen=True)
class InfluenceBound:
    """`R` lower bounds.

    `value`: `(R,)`, `|J delta| / (lambda_max + residual)`, at most `I(delta)` where Lanczos has found the largest
    eigenvalue; `lambda_max`: `(R,)`, the Ritz value, which is at most the true one; `residual`: `(R,)`, an eigenvalue
    lies within it of the Ritz value;
    `iterations`; `converged`: `(R,)`; `vectors`: `(R, n)`, to start the next call from.
    """

    value: Tensor
    lambda_max: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor
    vectors: Tensor


def influence(
    jacobian: InputJacobian,
    delta: Mapping[str, Tensor],
    *,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    method: Literal["auto", "lsmr", "dense"] = "auto",
) -> Influence:
    """`I(delta) = |(J J^T + damping)^{-1} J delta|` (Zhang et al. 2023, Eq. 4), for each problem of `jacobian`.

    Solved as the least-squares problem `min_b |J^T b - delta|^2 + damping |b|^2`. Where `J J^T` is singular and
    `damping` is 0 the solution of least norm is taken: what the gradient does not determine is not counted.

    `delta`: the perturbation of the (batch's) gradient, one tensor per parameter; per example it may also be
    `(B, *parameter_shape)`. `damping`: the paper's `eps`, added to `J J^T`; its published tables use 1.
    `tolerance`, `max_iterations`: of LSMR. `method`: "dense" forms `J` (small inputs), "lsmr" never does,
    "auto" chooses by size. Running out of iterations is reported in `converged`, never raised.
    """
    if damping < 0:
        raise InputError(f"`damping` must not be negative, got {damping}.")
    vector = _perturbation_rows(jacobian, delta)
    if method == "dense" or (method == "auto" and fits_dense(jacobian)):
        answer = dense_least_squares(jacobian.dense().mT, vector, damping=damping**0.5)
    else:
        operator = jacobian.transpose_operator()
        answer = lsmr(operator, vector, damping=damping**0.5, tolerance=tolerance, max_iterations=max_iterations)
    displacement = answer.solution.reshape(jacobian.inputs.shape)
    value = torch.linalg.vector_norm(answer.solution, dim=-1)
    return Influence(value, displacement, answer.residual, answer.iterations, answer.converged)


def influence_lower_bound(
    jacobian: InputJacobian,
    delta: Mapping[str, Tensor],
    *,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> InfluenceBound:
    """`I_lb(delta) = |J delta| / lambda_max(J J^T)` (Zhang et al. 2023, Eq. 5), for each problem of `jacobian`.

    `lambda_max` comes from Lanczos in input space. A Ritz value lies below it, so the bound divides by
    `ritz + residual`. `tolerance`: of Lanczos, relative to the Ritz value. `start`: `(R, n)`, the `vectors` of an
    earlier bound (a training loop's last step) save iterations. `delta`: as in `influence`.
    """
    projected = jacobian.matvec(delta).reshape(jacobian.num_problems, jacobian.size)
    top = largest_eigenpairs(
        jacobian.gram_operator(),
        1,
        tolerance=tolerance,
        max_iterations=max_iterations,
        start=start,
        generator=generator,
    )
    ritz, residual = top.values[:, 0], top.residual[:, 0]
    tiny = torch.finfo(ritz.dtype).tiny
    value = torch.linalg.vector_norm(projected, dim=-1) / (ritz + residual).clamp_min(tiny)
    return InfluenceBound(value, ritz, residual, top.iterations, top.converged, top.vectors[:, 0])


def fits_dense(jacobian: InputJacobian) -> bool:
    """Whether forming `J` is cheap: see `DENSE_SIZE` and `DENSE_ELEMENTS`."""
    elements = jacobian.num_problems * jacobian.size * jacobian.gradient.num_parameters
    return jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS


def _perturbation_rows(jacobian: InputJacobian, delta: Mapping[str, Tensor]) -> Tensor:
    """`delta` as one row per problem: `(R, P)`."""
    delta = {n: delta[n].to(p) for n, p in jacobian.parameters.items() if n in delta}
    if set(delta) != set(jacobian.parameters):
        raise InputError(f"`delta` lacks parameters of the model: {sorted(set(jacobian.parameters) - set(delta))[:5]}.")
    shared = all(delta[n].shape == p.shape for n, p in jacobian.parameters.items())
    rows = flatten(delta)[None].expand(jacobian.num_problems, -1) if shared else flatten(delta, batch_dims=1)
    if len(rows) != jacobian.num_problems:
        raise InputError(f"`delta` holds {len(rows)} perturbations for {jacobian.num_problems} problems.")
    return rows
