"""The measurement: what a perturbation of the gradient does to an attacker who matches it, in closed form.

One function for `Guard.measure`, `survey` and `benchmark.compare_initialisations`, so that one example has one number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add, norm
from gradguard.leakage import influence, influence_lower_bound
from gradguard.leakage.influence import DENSE_ELEMENTS, DENSE_SIZE

#: Iterations of the influence solver on inputs too large for a dense Jacobian.
MAX_ITERATIONS = 300


@dataclass(frozen=True)
class Measures:
    """The closed-form part of a measurement, per example.

    Args:
        predicted_error: `(R,)`, I2F (Zhang et al. 2023, Eq. 4) of the difference between the gradient that is sent and
            the true one, in input units (Euclidean norm over the example): the predicted error of gradient matching. An
            attacker who also knows what pictures look like can come closer. Infinite where `traceless`. The lower bound
            where only that was asked for.
        converged: `(R,)` bool, of the solver of `predicted_error`; where it is `False` the value is too small.
        lower_bound: `(R,)`, of the predicted error (Eq. 5), in its units. Infinite where `traceless`.
        lambda_max: `(R,)`, an estimate from below of the largest eigenvalue of `J J^T`.
        noise_ratio: `|sent - true| / |true|`; NaN where no true gradient was given.
        vectors: `(R, D)`, the leading eigenvectors, to start the next measurement from.
        projected: `(R,)`, `|J delta|`.
        room: `(R,)`, by how much the largest eigenvalue can exceed `lambda_max`, to the confidence asked for.
        bound_converged: `(R,)` bool, whether the bound is as tight as was asked.
        traceless: `(R,)` bool: `J` is zero, so the gradient does not show, to first order, how the example changes.
            Nothing can be predicted for it: it may be hidden (dead units), or the model may not be differentiable in it
            (rounding).
    """

    predicted_error: Tensor
    converged: Tensor
    lower_bound: Tensor
    lambda_max: Tensor
    noise_ratio: float
    vectors: Tensor
    projected: Tensor
    room: Tensor
    bound_converged: Tensor
    traceless: Tensor


def measure(
    jacobian: InputJacobian,
    delta: Mapping[str, Tensor],
    *,
    exact: bool = True,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = 0.1,
    confidence: float | None = 0.999,
    steps: int | None = None,
    start: Tensor | None = None,
    random: Tensor | None = None,
    noise_ratio: float = float("nan"),
    generator: torch.Generator | None = None,
) -> Measures:
    """Measure `delta`, what is added to the gradient that `jacobian` is the derivative of.

    The predicted error is solved for in float64 (where the device has it): with a dense Jacobian where that of *one*
    example is small, by Lanczos iterations otherwise. So an example's number does not depend on the others measured
    with it.

    Args:
        jacobian: The operator, of `R` problems.
        delta: One tensor per parameter, in the parameter's shape or `(R, *parameter_shape)`.
        exact: Solve for the influence itself; `False` leaves `predicted_error` at the lower bound.
        max_iterations: Of the influence solver, where the Jacobian is not formed.
        tolerance: Of the lower bound, see `leakage.influence_lower_bound`.
        confidence: The same.
        steps: Most Lanczos steps of the bound (default: as many as the tolerance needs).
        start: `(R, D)`, the `vectors` of an earlier measurement.
        random: `(R, D)`, Lanczos's first vectors, drawn by the caller.
        noise_ratio: Put into the result.
        generator: Randomness of the bound.

    Returns:
        The measures.

    Raises:
        InputError: `delta` does not fit the parameters.
    """
    bound = influence_lower_bound(
        jacobian,
        delta,
        tolerance=tolerance,
        max_iterations=steps,
        start=start,
        random=random,
        confidence=confidence,
        generator=generator,
    )
    traceless = bound.lambda_max <= 0
    predicted, converged = bound.value, bound.converged
    if exact:
        predicted, converged = _influence(jacobian, delta, max_iterations)
    return Measures(
        predicted_error=predicted.masked_fill(traceless, torch.inf),
        converged=converged,
        lower_bound=bound.value.masked_fill(traceless, torch.inf),
        lambda_max=bound.lambda_max,
        noise_ratio=noise_ratio,
        vectors=bound.vectors,
        projected=bound.projected,
        room=bound.residual,
        bound_converged=bound.converged,
        traceless=traceless,
    )


def difference(true: Gradient, sent: Mapping[str, Tensor]) -> Gradient:
    """`sent - true` of what was sent, in the true gradient's dtype and on its device."""
    return add({n: sent[n].to(g) for n, g in true.items() if n in sent}, true, -1.0)


def noise_ratio(true: Gradient, sent: Mapping[str, Tensor]) -> float:
    """`|sent - true| / |true|`, both of what was sent."""
    length = norm({n: g for n, g in true.items() if n in sent})
    return (norm(difference(true, sent)) / length.clamp_min(torch.finfo(length.dtype).tiny)).item()


def fits_dense(jacobian: InputJacobian) -> bool:
    """Whether the Jacobian of one problem is small enough to be formed."""
    elements = jacobian.size * jacobian.gradient.num_parameters
    return jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS


def _influence(jacobian: InputJacobian, delta: Mapping[str, Tensor], max_iterations: int) -> tuple[Tensor, Tensor]:
    """I2F and whether its solver converged, `(R,)` each."""
    if not fits_dense(jacobian):
        iterations = min(jacobian.size, max_iterations)
        answer = influence(jacobian, delta, method="lanczos", max_iterations=iterations)
        return answer.value, answer.converged
    # As many problems at a time as fit into the same memory.
    at_once = max(1, DENSE_ELEMENTS // (jacobian.size * jacobian.gradient.num_parameters))
    if at_once < (jacobian.chunk_size or jacobian.num_problems):
        jacobian = jacobian.with_chunk_size(at_once)
    answer = influence(jacobian, delta, method="dense")
    return answer.value, answer.converged
