"""Levenberg-Marquardt on the matching residual, for `T` trials at once.

Each step solves `min_s |J^T s + r|^2 + mu |s|^2` with `r = g(x) - sent` and the input Jacobian `J` at `x`, the very
operator that measures leakage. Near a solution it converges superlinearly, where first-order attacks crawl.
Where the factor `c` of the sent gradient is unknown, the residual is `c g(x) - sent` at the best `c`, and what a step
changes along `g` is projected out, since `c` makes up for it: variable projection.
Sources: Nocedal & Wright 2006, section 10.3; the damping rule is Nielsen 1999; variable projection is Golub & Pereyra
1973, with the derivative of Kaufman 1975.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.attacks._matching.lbfgs import Minima
from gradguard.attacks._matching.trials import Trials
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.restriction import sent_only
from gradguard.functional.structures import Rest, rows_of
from gradguard.functional.vectors import Gradient, flatten
from gradguard.linalg import LinearOperator, dense_least_squares, lsmr
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
    labels: Rest,
    *,
    sent: Gradient | None = None,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
    iterations: int = 50,
    inner_iterations: int = 200,
    tolerance: float = 1e-13,
    adaptive: bool = False,
) -> Minima:
    """Refine trials of an attack.

    `inputs`: `(T, B, *input_shape)`; `labels`: `(T, B, ...)`, kept. `sent`: `(T, *parameter_shape)` where trials are of
    different gradients than the observation's. `groups`: `(T,)`, which picture a trial is of: once a trial matches to
    rounding the others of its picture have lost and stay where they are. A trial ends when its step is below
    `tolerance` relative to its inputs, or nothing is left to gain. `weights`: `(T, P)` on the residual's elements, of
    the parameters that are matched, for instance 0 for elements that were not sent. `adaptive`: see `Trials`.
    Returns points `(T, B D)` and values: the relative squared matching loss. For `T B D` inputs that are too many
    for a dense `J` the step is solved by at most `inner_iterations` of LSMR.
    """
    trials = Trials([observation], adaptive=adaptive)
    function, names, free = trials.function, list(trials.sent), trials.free_scale
    all_sent = flatten(trials.sent if sent is None else {n: sent[n] for n in names}, batch_dims=1)
    all_sent = all_sent.expand(len(inputs), -1)
    all_weights = all_sent[:, :0] if weights is None else weights.to(all_sent)
    all_sent = all_sent if weights is None else all_sent * all_weights
    all_groups = torch.arange(len(inputs), device=inputs.device) if groups is None else groups

    def residual_at(x: Tensor, going: _Going) -> tuple[Tensor, Tensor, Tensor]:
        """`(c g(x) - sent) / |sent|`, the factor `c / |sent|`, and the direction of `g`, where `c` is free."""
        sent, scale = going.sent, going.scale
        own = flatten(trials.own(x.unflatten(1, shape), going.labels), batch_dims=1)
        own = own * going.weights if going.weights.shape[1] else own
        if not free:
            return (own - sent) / scale[:, None], 1 / scale, own[:, :0]
        length = _length(own).clamp_min(torch.finfo(own.dtype).tiny)
        direction = own / length[:, None]
        factor = (direction * sent).sum(-1) / length
        return (factor[:, None] * own - sent) / scale[:, None], factor / scale, direction

    shape = inputs.shape[1:]
    rows = torch.arange(len(inputs), device=inputs.device)
    going = _Going(
        x=inputs.flatten(1).clone(),
        labels=labels,
        sent=all_sent,
        groups=all_groups,
        weights=all_weights,
        scale=_length(all_sent),
    )
    going.residual, going.factor, going.direction = residual_at(going.x, going)
    going.value = (going.residual * going.residual).sum(-1)
    going.growth = torch.full_like(going.value, 2.0)
    going.done = ~torch.isfinite(going.value)
    points, values, done = going.x.clone(), going.value.clone(), going.done.clone()
    iteration = 0
    while iteration < iterations and len(rows):
        jacobian = sent_only(InputJacobian.of_trials(function, going.x.unflatten(1, shape), going.labels), names)
        model = _LinearModel(jacobian, going.factor, going.direction, going.weights)
        if iteration == 0:
            # In units of J J^T: the squared length of J^T along a random direction, the same for every trial. (No
            # constant one: networks that subtract their input's mean do not see it, and damping 0 never grows.)
            probe = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(inputs)
            probe = (probe / probe.norm()).flatten().expand_as(going.x)
            image = model.operator.matvec(probe)
            going.damping = 1e-3 * (image * image).sum(-1)
        iteration += 1
        step = _step(model, going.residual, going.damping, inner_iterations)
        candidate = going.x + step
        residual, factor, direction = residual_at(candidate, going)
        value = (residual * residual).sum(-1)
        better = torch.isfinite(value) & (value < going.value) & ~going.done
        predicted = going.value - _linear_value(model, going.residual, step)
        gained = going.value - value
        ratio = gained / predicted.clamp_min(torch.finfo(value.dtype).tiny)
        stuck = (gained.abs() <= LEAST_GAIN * going.value) & (predicted <= LEAST_GAIN * going.value)
        size = _length(step) / _length(going.x)
        going.x = torch.where(better[:, None], candidate, going.x)
        going.residual = torch.where(better[:, None], residual, going.residual)
        going.value = torch.where(better, value, going.value)
        going.factor = torch.where(better, factor, going.factor)
        going.direction = torch.where(better[:, None], direction, going.direction)
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

    def __init__(self, **state: Rest) -> None:
        self.x, self.labels, self.sent = state["x"], state["labels"], state["sent"]
        self.groups, self.scale, self.weights = state["groups"], state["scale"], state["weights"]
        self.residual = self.value = self.damping = self.growth = self.done = state["scale"]
        self.factor = self.direction = state["scale"]

    def select(self, rows: Tensor) -> None:
        """Keep the trials `rows` only."""
        for name, value in vars(self).items():
            setattr(self, name, rows_of(value, rows))


def _lost(values: Tensor, groups: Tensor) -> Tensor:
    """`(T,)`: trials whose group has a match to rounding that is not they."""
    matched = values <= MATCHED
    found = torch.zeros(int(groups.max()) + 1, dtype=torch.int64, device=groups.device)
    found = found.index_add(0, groups, matched.long())
    return (found[groups] > 0) & ~matched


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


class _LinearModel:
    """How the residual of each trial moves with its inputs: `P W J^T c / |sent|`, `W` the elements' weights.

    `factor`: `(T,)`, `c / |sent|`; `direction`: `(T, P)`, of the trial's own gradient, which `P` projects out since a
    free factor makes up for it, or `(T, 0)` where the factor is known.
    """

    def __init__(self, jacobian: InputJacobian, factor: Tensor, direction: Tensor, weights: Tensor) -> None:
        self.jacobian, self.factor, self.direction = jacobian, factor[:, None], direction
        if weights.shape[1]:
            self.factor = self.factor * weights
        whole = jacobian.transpose_operator()
        self.operator = LinearOperator(
            lambda step: self._projected(self.factor * whole.matvec(step)),
            lambda residual: whole.rmatvec(self.factor * self._projected(residual)),
            whole.shape,
            whole.like,
        )

    def dense(self) -> Tensor:
        """`(T, P, B D)`."""
        matrix = self.jacobian.dense().mT * self.factor[..., None]
        if not self.direction.shape[1]:
            return matrix
        return matrix - self.direction[..., None] * (self.direction[:, None] @ matrix)

    def _projected(self, vectors: Tensor) -> Tensor:
        if not self.direction.shape[1]:
            return vectors
        return vectors - self.direction * (self.direction * vectors).sum(-1, keepdim=True)


def _step(model: _LinearModel, residual: Tensor, damping: Tensor, inner_iterations: int) -> Tensor:
    """`argmin_s |A s + r|^2 + damping |s|^2` with the linear model `A`, the more exactly the smaller `r` is."""
    jacobian = model.jacobian
    elements = jacobian.num_problems * jacobian.size * jacobian.gradient.num_parameters
    if jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS:
        matrix = model.dense()
        # A trial where the network overflows has lost; a decomposition of its J would end the others with it.
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        matrix = torch.where(finite[:, None, None], matrix, torch.zeros_like(matrix))
        return dense_least_squares(matrix, -residual, damping=damping.sqrt()).solution
    return lsmr(
        model.operator,
        -residual,
        damping=damping.sqrt(),
        max_iterations=inner_iterations,
        tolerance=1e-8,
        reduction=_length(residual).sqrt().clamp_max(FORCING),
    ).solution


def _linear_value(model: _LinearModel, residual: Tensor, step: Tensor) -> Tensor:
    """`|r + A s|^2`, what the linear model expects after the step."""
    moved = residual + model.operator.matvec(step)
    return (moved * moved).sum(-1)
