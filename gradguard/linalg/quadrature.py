"""Functions of symmetric operators by Lanczos: `f(A) v`, `v^T f(A) v` and `tr f(A)`, never forming `A`.

`k` Lanczos steps from `v` give a tridiagonal `T` whose eigenvalues and first components are the nodes and weights of
the Gauss quadrature for `v`'s spectral measure: `v^T f(A) v ~ |v|^2 sum_i (e_1^T s_i)^2 f(theta_i)`, exact for
polynomials of degree `2k - 1`. Where the even derivatives of `f` are positive (`1/x`, `1/(1+x)`) it lies below.
Sources: Golub & Meurant 2010, "Matrices, Moments and Quadrature", chapter 6; Ubaru, Chen & Saad 2017, "Fast estimation
of tr(f(A)) via stochastic Lanczos quadrature".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.linalg.lanczos import krylov_spaces
from gradguard.linalg.operator import LinearOperator, safe_inverse

ScalarFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FunctionProduct:
    """`f(A) v` and `v^T f(A) v`.

    Args:
        product: `f(A) v`, shape `(R, n)`.
        quadratic: `v^T f(A) v`, shape `(R,)`, in float64.
        nodes: The nodes of the quadrature, shape `(R, k)`.
        weights: Its weights, shape `(R, k)`; they sum to `|v|^2`.
        iterations: Lanczos steps `k`.
        residual: Shape `(R,)`: by what share `quadratic` changed at the last check.
        converged: Shape `(R,)`: whether `residual` is below the tolerance.
    """

    product: Tensor
    quadratic: Tensor
    nodes: Tensor
    weights: Tensor
    iterations: int
    residual: Tensor
    converged: Tensor


@dataclass(frozen=True)
class TraceEstimate:
    """`tr f(A)` of each problem, and how surely it is known.

    Args:
        value: Shape `(R,)`.
        standard_error: Shape `(R,)`, over the probes.
        iterations: Lanczos steps, of the probe that took most.
        converged: Shape `(R,)`: whether every probe's quadrature is.
    """

    value: Tensor
    standard_error: Tensor
    iterations: int
    converged: Tensor


def function_product(
    operator: LinearOperator,
    function: ScalarFunction,
    start: Tensor,
    *,
    steps: int = 100,
    tolerance: float = 0.0,
    check_every: int = 5,
) -> FunctionProduct:
    """`f(A) v` and `v^T f(A) v` of `R` symmetric operators. Holds `R * steps * n` elements.

    Args:
        operator: The maps `A`, shape `(R, n, n)`.
        function: `f`, elementwise, from eigenvalues `(R, k)` in float64.
        start: The vectors `v`, shape `(R, n)`.
        steps: Largest number of Lanczos steps, at least 1; at most `n` are taken.
        tolerance: Stop once every `v^T f(A) v` changes by less than this share in `check_every` steps. 0: take all
            steps.
        check_every: Steps between two checks.

    Returns:
        The products and the quadrature they come from.

    Raises:
        InputError: If `steps` is below 1.
    """
    if steps < 1:
        raise InputError(f"`steps` must be at least 1, got {steps}.")
    n = operator.shape[-1]
    limit = min(steps, n)
    squared = (start.double() ** 2).sum(-1, keepdim=True)
    before = residual = torch.full_like(squared[:, 0], torch.inf)
    for space in krylov_spaces(operator, limit, start=start, check_every=check_every):
        # The tridiagonal matrix is small: its eigenvalues in float64, whatever the vectors are in.
        nodes, rotation = torch.linalg.eigh(space.tridiagonal().double())
        weights = squared * rotation[:, 0] ** 2
        # A space that was exhausted leaves nodes of weight 0, at which `f` may be infinite.
        values = torch.where(weights > 0, function(nodes), torch.zeros_like(nodes))
        quadratic = (weights * values).sum(-1)
        residual, before = (quadratic - before).abs() * safe_inverse(quadratic.abs()), quadratic
        if tolerance > 0 and bool((residual <= tolerance).all()):
            break
    k = nodes.shape[-1]
    if k == n:  # a full space has nothing left to give
        residual = torch.zeros_like(residual)
    coefficients = torch.einsum("rjk,rk->rj", rotation, values * rotation[:, 0]) * squared.sqrt()
    product = torch.einsum("rj,rjn->rn", coefficients.to(space.basis), space.basis)
    return FunctionProduct(product, quadratic, nodes, weights, k, residual, residual <= tolerance)


def trace_of_function(
    operator: LinearOperator,
    function: ScalarFunction,
    *,
    probes: int = 16,
    steps: int = 100,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """`tr f(A)` by stochastic Lanczos quadrature: the mean of `v^T f(A) v` over vectors of random signs.

    Args:
        operator: `R` symmetric maps `A`, shape `(R, n, n)`.
        function: `f`, elementwise, from eigenvalues `(R, k)` in float64.
        probes: Number of vectors per problem, at least 1. The standard error falls with its root.
        steps: Lanczos steps per probe.
        tolerance: As in `function_product`.
        generator: Draws the signs.

    Returns:
        The estimates and their standard errors, infinite for a single probe.
    """
    signs = random_signs(operator, probes, generator).unbind(1)
    found = [function_product(operator, function, v, steps=steps, tolerance=tolerance) for v in signs]
    value, error = mean_and_error(torch.stack([one.quadratic for one in found], dim=1))
    converged = torch.stack([one.converged for one in found]).all(0)
    return TraceEstimate(value, error, max(one.iterations for one in found), converged)


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the last dimension and its standard error.

    Args:
        samples: Shape `(..., K)`.

    Returns:
        Both of shape `(...,)`. The standard error is infinite for a single sample.
    """
    count = samples.shape[-1]
    spread = samples.std(dim=-1) if count > 1 else torch.full_like(samples[..., 0], torch.inf)
    return samples.mean(dim=-1), spread / count**0.5


def random_signs(operator: LinearOperator, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Vectors of random signs, drawn on the CPU so that devices agree.

    Args:
        operator: Gives the shape, dtype and device.
        count: Number of vectors per problem, at least 1.
        generator: Draws them.

    Returns:
        Shape `(R, count, n)`, elements -1 and 1.

    Raises:
        InputError: If `count` is below 1.
    """
    if count < 1:
        raise InputError(f"`probes` must be at least 1, got {count}.")
    rows, _, n = operator.shape
    device = generator.device if generator is not None else torch.device("cpu")
    signs = torch.randint(0, 2, (rows, count, n), generator=generator, device=device)
    return (2 * signs - 1).to(operator.device, operator.dtype)
