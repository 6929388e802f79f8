"""Levenberg-Marquardt on the matching residual, for `T` trials at once.

Each step solves `min_s |J^T s + r|^2 + mu |s|^2` with `r = g(x) - sent` and the input Jacobian `J` at `x`, the very
operator that measures leakage. Near a solution it converges superlinearly, where first-order attacks crawl.
Sources: Nocedal & Wright 2006, section 10.3; the damping rule is Nielsen 1999.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, vmap

from gradguard.attacks._matching.lbfgs import Minima
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, flatten
from gradguard.linalg import dense_least_squares, lsmr
from gradguard.threats.observation import Observation

#: `J` of all trials is formed where it takes at most this many elements (512 MiB in float64) and few rows.
DENSE_ELEMENTS, DENSE_SIZE = 2**26, 256
#: A matching loss that only the picture itself reaches; another trial of it has nothing to add.
MATCHED = 1e-20
#: A trial ends at a step that gains no more than this share of its value, and was not expected to: what is left is the
#: rounding or noise of the sent gradient.
LEAST_GAIN = 1e-10
#: How far a step's normal equations are solved at most: far from the solution it is not worth more (inexact Newton,
#: Nocedal & Wright 2006, section 7.1).
FORCING = 0.1


def levenberg_marquardt(
    observation: Observation,
    inputs: Tensor,
    labels: Tensor,
    *,
    sent: Gradient | None = None,
    groups: Tensor | None = None,
    iterations: int = 50,
    inner_iterations: int = 200,
    tolerance: float = 1e-13,
) -> Minima:
    """Refine trials of an attack.

    `inputs`: `(T, B, *input_shape)`; `labels`: `(T, B, ...)`, kept. `sent`: `(T, *parameter_shape)` where trials are of
    different gradients than the observation's. `groups`: `(T,)`, which picture a trial is of: once a trial matches to
    rounding the others of its picture have lost and stay where they are. A trial ends when its step is below
    `tolerance` relative to its inputs, or nothing is left to gain.
    Returns points `(T, B D)` and values: the relative squared matching loss. For `T B D` inputs that are too many
    for a dense `J` the step is solved by at most `inner_iterations` of LSMR.
    """
    function = observation.loss_gradient
    parameters = function.parameters()
    all_sent = flatten(observation.sent)[None] if sent is None else flatten(sent, batch_dims=1)
    all_sent = all_sent.expand(len(inputs), -1)
    all_groups = torch.arange(len(inputs), device=inputs.device) if groups is None else groups

    def gradient_of(x: Tensor, y: Tensor) -> Tensor:
        g: Gradient = grad(function.loss)(parameters, x, y)
        return flatten(g)

    residual_of = vmap(gradient_of)
    shape = inputs.shape[1:]
    rows = torch.arange(len(inputs), device=inputs.device)
    going = _Going(
        x=inputs.flatten(1).clone(), labels=labels, sent=all_sent, groups=all_groups, scale=_length(all_sent)
    )
    going.residual = (residual_of(inputs, labels) - going.sent) / going.scale[:, None]
    going.value = (going.residual * going.residual).sum(-1)
    going.growth = torch.full_like(going.value, 2.0)
    going.done = ~torch.isfinite(going.value)
    points, values, done = going.x.clone(), going.value.clone(), going.done.clone()
    iteration = 0
    while iteration < iterations and len(rows):
        jacobian = InputJacobian.of_trials(function, going.x.unflatten(1, shape), going.labels)
        if iteration == 0:
            # In units of J J^T: the squared length of J^T along a random direction, the same for every trial. (No
            # constant one: networks that subtract their input's mean do not see it, and damping 0 never grows.)
            probe = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(inputs)
            probe = (probe / probe.norm()).flatten().expand_as(going.x)
            image = jacobian.transpose_operator().matvec(probe) / going.scale[:, None]
            going.damping = 1e-3 * (image * image).sum(-1)
        iteration += 1
        step = _step(jacobian, going.residual, going.damping, going.scale, inner_iterations)
        candidate = going.x + step
        residual = (residual_of(candidate.unflatten(1, shape), going.labels) - going.sent) / going.scale[:, None]
        value = (residual * residual).sum(-1)
        better = torch.isfinite(value) & (value < going.value) & ~going.done
        predicted = going.value - _linear_value(jacobian, going.residual, step, going.scale)
        gained = going.value - value
        ratio = gained / predicted.clamp_min(torch.finfo(value.dtype).tiny)
        stuck = (gained.abs() <= LEAST_GAIN * going.value) & (predicted <= LEAST_GAIN * going.value)
        size = _length(step) / _length(going.x)
        going.x = torch.where(better[:, None], candidate, going.x)
        going.residual = torch.where(better[:, None], residual, going.residual)
        going.value = torch.where(better, value, going.value)
        shrink = (1 - (2 * ratio - 1) ** 3).clamp_min(1 / 3)
        going.damping = going.damping * torch.where(better, shrink, going.growth)
        going.growth = torch.where(better, torch.full_like(going.growth, 2.0), going.growth * 2)
        going.done = going.done | (size <= tolerance) | stuck
        points[rows], values[rows], done[rows] = going.x, going.value, going.done
        left = torch.nonzero(~(going.done | _lost(values, all_groups)[rows])).flatten()
        if len(left) < len(rows):
            rows = rows[left]
            going.select(left)
    return Minima(points, values, iteration, done)


class _Going:
    """The state of the trials that are still going, one row each."""

    def __init__(self, **state: Tensor) -> None:
        self.x, self.labels, self.sent = state["x"], state["labels"], state["sent"]
        self.groups, self.scale = state["groups"], state["scale"]
        self.residual = self.value = self.damping = self.growth = self.done = state["scale"]

    def select(self, rows: Tensor) -> None:
        """Keep the trials `rows` only."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def _lost(values: Tensor, groups: Tensor) -> Tensor:
    """`(T,)`: trials whose group has a match to rounding that is not they."""
    matched = values <= MATCHED
    found = torch.zeros(int(groups.max()) + 1, dtype=torch.int64, device=groups.device)
    found = found.index_add(0, groups, matched.long())
    return (found[groups] > 0) & ~matched


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _step(jacobian: InputJacobian, residual: Tensor, damping: Tensor, scale: Tensor, inner_iterations: int) -> Tensor:
    """`argmin_s |J^T s / scale + r|^2 + damping |s|^2`, the more exactly the smaller `r` is."""
    elements = jacobian.num_problems * jacobian.size * jacobian.gradient.num_parameters
    if jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS:
        matrix = jacobian.dense().mT / scale[:, None, None]
        # A trial where the network overflows has lost; a decomposition of its J would end the others with it.
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        matrix = torch.where(finite[:, None, None], matrix, torch.zeros_like(matrix))
        return dense_least_squares(matrix, -residual, damping=damping.sqrt()).solution
    operator = jacobian.transpose_operator()
    return lsmr(
        operator,
        -residual * scale[:, None],
        damping=damping.sqrt() * scale,
        max_iterations=inner_iterations,
        tolerance=1e-8,
        reduction=_length(residual).sqrt().clamp_max(FORCING),
    ).solution


def _linear_value(jacobian: InputJacobian, residual: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    """`|r + J^T s|^2`, what the linear model expects after the step."""
    moved = residual + jacobian.transpose_operator().matvec(step) / scale[:, None]
    return (moved * moved).sum(-1)
