"""The inversion influence function: how far a perturbation of the gradient moves a matching attacker's picture.

Source: Zhang et al. 2023, "Understanding Deep Gradient Leakage via Inversion Influence Functions" (I2F).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.restriction import sent_only
from gradguard.functional.vectors import Gradient, flatten
from gradguard.linalg import (
    dense_least_squares,
    lanczos_solve,
    largest_eigenvalue,
    largest_eigenvalue_bound,
    lsmr,
)

#: `J` is formed where it takes at most this many elements (256 MiB in float64) ...
DENSE_ELEMENTS = 2**25
#: ... and at most this many rows: beyond, a few hundred products are cheaper than a factorisation.
DENSE_SIZE = 1024

Result = TypeVar("Result", "Influence", "InfluenceBound")


@dataclass(frozen=True)
class Influence:
    """`R` predictions: one per example, or one for the joint operator.

    Args:
        value: `I(delta) = |displacement|`, shape `(R,)`, in input units (Euclidean norm over the problem's inputs).
        displacement: How the reconstruction moves, `x_hat ~ x + displacement`; shape of the inputs.
        residual: The solver's own, shape `(R,)`; see `influence`.
        iterations: Of the solver.
        converged: Shape `(R,)`.
    """

    value: Tensor
    displacement: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor


@dataclass(frozen=True)
class InfluenceBound:
    """`R` lower bounds of the influence.

    Args:
        value: `|J delta| / (lambda_max + residual)`, shape `(R,)`, input units; at most `I(delta)`.
        lambda_max: The Ritz value, shape `(R,)`; at most the true one.
        residual: By how much the true one can exceed it, to the confidence asked for, shape `(R,)`. With
            `method="trace"` `lambda_max` is such a bound from above itself, and `residual` 0.
        iterations: Lanczos steps.
        converged: Shape `(R,)`.
        vectors: Shape `(R, n)`, to start the next call from.
        projected: `|J delta|`, shape `(R,)`.
    """

    value: Tensor
    lambda_max: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor
    vectors: Tensor
    projected: Tensor


def influence(
    jacobian: InputJacobian,
    delta: Mapping[str, Tensor],
    *,
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    method: Literal["auto", "lanczos", "lsmr", "dense"] = "auto",
) -> Influence:
    """`I(delta) = |(J J^T + damping)^{-1} J delta|` (Zhang et al. 2023, Eq. 4), for each problem of `jacobian`.

    The least-squares problem `min_b |J^T b - delta|^2 + damping |b|^2`. Where `J J^T` is singular and `damping` is 0
    the solution of least norm is taken: what the gradient does not determine is not counted. Computed in float64
    wherever the device has it: small eigenvalues of `J J^T`, which influence is made of, are lost in float32.

    Args:
        jacobian: `R` problems.
        delta: The perturbation of the (batch's) gradient, one tensor per parameter; per example it may also be
            `(B, *parameter_shape)`. Parameters that it does not name were not sent: the attacker knows nothing of their
            gradient, and `J` is that of the others (`functional.restriction`).
        damping: The paper's `eps`, added to `J J^T`; not negative. Its published tables use 1.
        tolerance: Of the solver, on `residual`.
        max_iterations: Of the solver.
        method: "dense" forms `J` (small inputs) and is right at any condition number. "lanczos" solves in input space
            and never holds a parameter-sized vector per example, at condition numbers of `J` up to 1e6 or so. "lsmr"
            does with a worse one, and holds such vectors. "auto" is dense where `J` is small, else Lanczos.

    Returns:
        The predictions. `residual` is relative to `|J delta|` (Lanczos), or as in `linalg.LeastSquares`. Running out of
        iterations is reported in `converged`, never raised; a Lanczos solution that is cut short is too short, so its
        value is a lower bound.

    Raises:
        InputError: If an option is not one of its values, or `delta` does not fit the model.
    """
    if damping < 0:
        raise InputError(f"`damping` must not be negative, got {damping}.")
    if method not in ("auto", "lanczos", "lsmr", "dense"):
        raise InputError(f'`method` must be "auto", "lanczos", "lsmr" or "dense", got {method!r}.')
    jacobian, delta = _of_what_was_sent(jacobian, delta)

    def solve(part: InputJacobian, delta: Gradient) -> Influence:
        part = part if part.inputs.device.type == "mps" else part.in_dtype(torch.float64)  # MPS has none
        delta = {n: d.to(part.inputs) for n, d in delta.items()}
        if method == "dense" or (method == "auto" and fits_dense(part)):
            answer = dense_least_squares(part.dense().mT, _rows(part, delta), damping=damping**0.5)
        elif method == "lsmr":
            answer = lsmr(
                part.transpose_operator(),
                _rows(part, delta),
                damping=damping**0.5,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
        else:
            answer = lanczos_solve(
                part.gram_operator(),
                part.matvec(delta).reshape(part.num_problems, part.size),
                damping=damping,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
        solution = answer.solution.to(jacobian.inputs)
        displacement = solution.reshape(part.inputs.shape)
        value = torch.linalg.vector_norm(solution, dim=-1)
        return Influence(value, displacement, answer.residual, answer.iterations, answer.converged)

    return _by_chunk(solve, jacobian, delta)


def influence_lower_bound(
    jacobian: InputJacobian,
    delta: Mapping[str, Tensor],
    *,
    tolerance: float = 0.1,
    max_iterations: int | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    confidence: float | None = 0.999,
    method: Literal["lanczos", "trace"] = "lanczos",
    generator: torch.Generator | None = None,
) -> InfluenceBound:
    """`I_lb(delta) = |J delta| / lambda_max(J J^T)` (Zhang et al. 2023, Eq. 5), for each problem of `jacobian`.

    "lanczos" finds `lambda_max` in input space. A Ritz value lies below it, and its residual only says that some
    eigenvalue is near; so the bound divides by what `lambda_max` is below with probability `confidence`
    (`linalg.largest_eigenvalue`), and steps until that is within a share `tolerance` of the Ritz value.

    Args:
        jacobian: `R` problems.
        delta: As in `influence`.
        tolerance: See above.
        max_iterations: Lanczos steps.
        start: Shape `(R, n)`, the `vectors` of an earlier bound (a training loop's last step); saves iterations.
        random: Shape `(R, n)`, as in `linalg.largest_eigenvalue`.
        confidence: Probability with which the bound holds. `None`: divide by `ritz + residual`: fewer steps, nearly
            none from a good `start`, and no such promise.
        method: "lanczos", or "trace", which divides by a bound from 8 random vectors alone
            (`linalg.largest_eigenvalue_bound`), sure to 0.999 and lower.
        generator: Draws the random vectors.

    Returns:
        The bounds.

    Raises:
        InputError: If there is no such method, or `delta` does not fit the model.
    """
    if method not in ("lanczos", "trace"):
        raise InputError(f'`method` must be "lanczos" or "trace", got {method!r}.')
    jacobian, delta = _of_what_was_sent(jacobian, delta)
    chunk = jacobian.chunk_size or jacobian.num_problems
    starts = repeat(None) if start is None else iter(start.split(chunk))
    randoms = repeat(None) if random is None else iter(random.split(chunk))

    def bound(part: InputJacobian, delta: Gradient) -> InfluenceBound:
        projected = torch.linalg.vector_norm(part.matvec(delta).reshape(part.num_problems, part.size), dim=-1)
        operator = part.gram_operator()
        tiny = torch.finfo(projected.dtype).tiny
        if method == "trace":
            above = largest_eigenvalue_bound(operator, generator=generator)
            value, zeros = projected / above.clamp_min(tiny), torch.zeros_like(above)
            vectors = torch.zeros(operator.shape[0], operator.shape[-1], dtype=value.dtype, device=value.device)
            return InfluenceBound(value, above, zeros, 8, zeros == 0, vectors, projected)
        top = largest_eigenvalue(
            operator,
            tolerance=tolerance,
            confidence=confidence,
            max_iterations=max_iterations,
            start=next(starts),
            random=next(randoms),
            generator=generator,
        )
        value, room = projected / top.upper.clamp_min(tiny), top.upper - top.value
        return InfluenceBound(value, top.value, room, top.iterations, top.converged, top.vector, projected)

    return _by_chunk(bound, jacobian, delta)


def fits_dense(jacobian: InputJacobian) -> bool:
    """Whether forming `J` is cheap: see `DENSE_SIZE` and `DENSE_ELEMENTS`."""
    elements = jacobian.num_problems * jacobian.size * jacobian.gradient.num_parameters
    return jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS


def _by_chunk(measure: Callable[[InputJacobian, Gradient], Result], jacobian: InputJacobian, delta: Gradient) -> Result:
    """`measure` on each chunk of the problems to its end, which is what bounds the memory; results put together."""
    shared = _shared(jacobian, delta)
    found = [
        measure(part, delta if shared else {n: d[rows] for n, d in delta.items()}) for rows, part in jacobian.chunks()
    ]
    if len(found) == 1:
        return found[0]
    merged: dict[str, Any] = {}
    for field in fields(found[0]):
        values = [getattr(f, field.name) for f in found]
        merged[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else max(values)
    return type(found[0])(**merged)


def _of_what_was_sent(jacobian: InputJacobian, delta: Mapping[str, Tensor]) -> tuple[InputJacobian, Gradient]:
    """`J` restricted to the parameters that `delta` names, and `delta` in their order.

    Returns:
        Both.

    Raises:
        InputError: For a `delta` without a name, with one of no parameter, or with the wrong number of rows.
    """
    if not isinstance(delta, Mapping):
        raise InputError(f"`delta` is a dictionary keyed as `named_parameters()`, got {type(delta).__name__}.")
    jacobian = sent_only(jacobian, list(delta))
    checked = {n: delta[n] for n in jacobian.parameters}
    if not _shared(jacobian, checked):
        for name, value in checked.items():
            shape = jacobian.parameters[name].shape
            if value.shape[1:] != shape or value.ndim != len(shape) + 1:
                raise InputError(
                    f"`delta[{name!r}]` has shape {tuple(value.shape)}; it must be {tuple(shape)}, or "
                    f"{(jacobian.num_problems, *shape)} for one perturbation per problem."
                )
            if len(value) != jacobian.num_problems:
                raise InputError(f"`delta` holds {len(value)} perturbations for {jacobian.num_problems} problems.")
    return jacobian, checked


def _shared(jacobian: InputJacobian, delta: Gradient) -> bool:
    """Whether one perturbation stands for all problems."""
    return all(delta[n].shape == p.shape for n, p in jacobian.parameters.items())


def _rows(jacobian: InputJacobian, delta: Gradient) -> Tensor:
    """`delta` as one row per problem: `(R, P)`."""
    if _shared(jacobian, delta):
        return flatten(delta)[None].expand(jacobian.num_problems, -1)
    return flatten(delta, batch_dims=1)
