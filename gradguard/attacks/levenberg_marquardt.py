"""Levenberg-Marquardt on the matching residual, for `T` trials at once.

Each step solves `min_s |J^T s + r|^2 + mu |s|^2` with `r = g(x) - sent` and the input Jacobian `J` at `x`, the very
operator that measures leakage. Near a solution it converges superlinearly, where first-order attacks crawl.
Sources: Nocedal & Wright 2006, section 10.3; the damping rule is Nielsen 1999.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, vmap

from gradguard.attacks.base import Observation
from gradguard.attacks.lbfgs import Minima
from gradguard.gradients import Gradient, flatten
from gradguard.jacobian import InputJacobian
from gradguard.linalg import dense_least_squares, lsmr

#: `J` of all trials is formed where it takes at most this many elements (512 MiB in float64) and few rows.
DENSE_ELEMENTS, DENSE_SIZE = 2**26, 256


def levenberg_marquardt(
    observation: Observation,
    inputs: Tensor,
    labels: Tensor,
    *,
    iterations: int = 50,
    inner_iterations: int = 100,
    tolerance: float = 1e-13,
) -> Minima:
    """Refine trials of an attack.

    `inputs`: `(T, B, *input_shape)`; `labels`: `(T, B, ...)`, kept. Ends when every trial's step is below
    `tolerance` relative to its inputs, or its damping has grown until no step makes progress.
    Returns points `(T, B D)` and values: the relative squared matching loss. For `T B D` inputs that are too many
    for a dense `J` the step is solved by at most `inner_iterations` of LSMR.
    """
    function = observation.loss_gradient
    parameters = function.parameters()
    sent = flatten(observation.sent)
    scale = (sent @ sent).sqrt()

    def gradient_of(x: Tensor, y: Tensor) -> Tensor:
        g: Gradient = grad(function.loss)(parameters, x, y)
        return flatten(g)

    residual_of = vmap(gradient_of)
    shape = inputs.shape
    x = inputs.flatten(1).clone()
    residual = (residual_of(inputs, labels) - sent) / scale
    value = (residual * residual).sum(-1)
    damping, growth = torch.zeros_like(value), torch.full_like(value, 2.0)
    done = ~torch.isfinite(value)
    for iteration in range(iterations):
        jacobian = InputJacobian.of_trials(function, x.reshape(shape), labels)
        if iteration == 0:
            # In units of J J^T: the squared length of J^T along a random direction, the same for every trial. (No
            # constant one: networks that subtract their input's mean do not see it, and damping 0 never grows.)
            probe = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
            image = jacobian.transpose_operator().matvec((probe / probe.norm()).expand_as(x)) / scale
            damping = 1e-3 * (image * image).sum(-1)
        step = _step(jacobian, residual, damping, scale, inner_iterations)
        candidate = x + step
        new_residual = (residual_of(candidate.reshape(shape), labels) - sent) / scale
        new_value = (new_residual * new_residual).sum(-1)
        better = torch.isfinite(new_value) & (new_value < value) & ~done
        predicted = value - _linear_value(jacobian, residual, step, scale)
        ratio = (value - new_value) / predicted.clamp_min(torch.finfo(value.dtype).tiny)
        size = torch.linalg.vector_norm(step, dim=-1) / torch.linalg.vector_norm(x, dim=-1)
        x = torch.where(better[:, None], candidate, x)
        residual = torch.where(better[:, None], new_residual, residual)
        value = torch.where(better, new_value, value)
        shrink = (1 - (2 * ratio - 1) ** 3).clamp_min(1 / 3)
        damping = torch.where(better, damping * shrink, damping * growth)
        growth = torch.where(better, torch.full_like(growth, 2.0), growth * 2)
        done = done | (size <= tolerance)
        if bool(done.all()):
            break
    return Minima(x, value, iteration + 1, done)


def _step(jacobian: InputJacobian, residual: Tensor, damping: Tensor, scale: Tensor, inner_iterations: int) -> Tensor:
    """`argmin_s |J^T s / scale + r|^2 + damping |s|^2`."""
    elements = jacobian.num_problems * jacobian.size * jacobian.gradient.num_parameters
    if jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS:
        matrix = jacobian.dense().mT / scale
        # A trial where the network overflows has lost; a decomposition of its J would end the others with it.
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        matrix = torch.where(finite[:, None, None], matrix, torch.zeros_like(matrix))
        return dense_least_squares(matrix, -residual, damping=damping.sqrt()).solution
    operator = jacobian.transpose_operator()
    return lsmr(
        operator, -residual * scale, damping=damping.sqrt() * scale, max_iterations=inner_iterations, tolerance=1e-8
    ).solution


def _linear_value(jacobian: InputJacobian, residual: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    """`|r + J^T s|^2`, what the linear model expects after the step."""
    moved = residual + jacobian.transpose_operator().matvec(step) / scale
    return (moved * moved).sum(-1)
