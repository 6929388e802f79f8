"""R-GAP: the input in closed form, layer by layer from the last to the first.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 3. Differs from the paper in: float64 and rows of comparable
size, whatever the model's dtype; every layer matrix-free; padding known to be zero instead of solved for; every
candidate of the last layer tried, and the one kept whose gradient matches best; heads with a bias, and softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradguard.attacks.base import Attack, Observation, Reconstruction
from gradguard.attacks.heads import (
    Head,
    bias_head,
    is_softmax_cross_entropy,
    logistic_heads,
    logistic_targets,
    recover_targets,
    softmax_heads,
)
from gradguard.chain import (
    Activation,
    Affine,
    ChannelScale,
    LayerSystem,
    MeanPool,
    all_parameters,
    few_threads,
    walk,
)
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.linalg import LinearOperator
from gradguard.linalg.cgls import cgls

#: A matching loss that only the truth reaches: the other candidates need not be tried.
_PERFECT = 1e-20
#: Units within this many times the relative error of a kink are doubtful; more of them than this are not tried.
_REACH = 50
_MOST_DOUBTS = 16
#: Rounding of float32, in which gradients are mostly sent; a residual that leaves nothing to doubt.
_SINGLE = 1.2e-7
_EXACT = 1e-12


@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """The recursive attack on the gradient of one example: deterministic, no optimisation, no prior.

    For chains of Linear, Conv2d, one-to-one activations, batch normalisation in eval mode, ReLU and average pooling
    (see `gradguard.chain`). ReLU hides the outputs that are not positive: a layer below one is solved from the outputs
    that are, and its gradient. Average pooling hides all but the means, and mostly leaves the layers below short. It
    starts at the lowest linear layer that has a bias, under any loss; without one at the last layer, under the binary
    logistic loss (`nn.BCEWithLogitsLoss`, `nn.SoftMarginLoss`) or softmax cross-entropy. Labels are recovered if not
    given.

    `tolerance`: the attack has converged if no layer's relative residual is above it.
    `damping`: `lambda` in `min |A x - b|^2 + lambda^2 |x|^2` per layer, for rows of norm 1: above 0 it keeps a noisy
        gradient from blowing up, and makes the solution of a clean one a little wrong.
    `max_iterations`: per layer; a layer that is determined seldom needs a thousand.

    `details["layers"]` has one row per solved layer, last first: `layer`, `unknowns`, `weight_constraints`,
    `gradient_constraints`, `rank_bound` (what they can at most determine), `residual` (relative, rows scaled),
    `iterations`, `solved` (the iteration ended before its limit), `hidden` (outputs that a ReLU above hides), `outside`
    (the share of the solution that is no value of the activation below, and was moved to the nearest), `crossed` (units
    of the activation above that rounding had put on the wrong side of its kink). A layer with a `rank_bound` below its
    `unknowns` gets the solution of least norm; the layers below it then show large residuals. `details["short"]` names
    these layers, and the attack has not converged if there is one; `details["note"]` says so in words.
    `details["twins"]`: how many other pictures have the same gradient, which only the value range tells from the one
    returned.
    """

    tolerance: float = 1e-4
    damping: float = 0.0
    max_iterations: int = 10_000

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise InputError(f"`tolerance` must be positive, got {self.tolerance}.")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"`damping` must be zero or positive, and finite, got {self.damping}.")
        if self.max_iterations < 1:
            raise InputError(f"`max_iterations` must be at least 1, got {self.max_iterations}.")

    def check(self, observation: Observation) -> None:
        """Raises `InputError` for a batch or a zero gradient, `UnsupportedModelError` for what cannot be walked."""
        if observation.batch_size != 1:
            raise InputError(
                f"RGAP recovers one picture from its own gradient; this one is of a batch of {observation.batch_size}, "
                "which would give a combination of them. Use a gradient-matching attack."
            )
        _Problem(observation)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack. It draws no random numbers."""
        problem = _Problem(observation)
        heads = problem.heads()
        details: dict[str, Any] = {"start": problem.start.name, "head": problem.kind, "candidates": len(heads)}
        with few_threads(problem.chain.layers):
            found = self._trials(problem, heads)
        if not found:
            return Reconstruction(attack=self.name, details=details | {"failure": "no candidate gave finite values"})
        best, twins = problem.choose(found)
        residual = max((row["residual"] for row in best.rows), default=0.0)
        short = [row["layer"] for row in best.rows if _is_short(row)]
        return Reconstruction(
            attack=self.name,
            inputs=best.x[None],
            labels=best.targets,
            matching_loss=best.loss,
            converged=residual <= self.tolerance and all(row["solved"] for row in best.rows) and not short,
            details=details
            | {"candidate": best.head.origin, "twins": twins, "residual": residual, "layers": best.rows}
            | {"short": short, "note": _note(best.rows)},
        )

    def _trials(self, problem: _Problem, heads: list[Head]) -> list[_Trial]:
        """Every candidate that gives finite values, with its matching loss."""
        if len(heads) > 1:
            # A wrong candidate shows in the first layer that is solved; the likeliest first saves the others' solves.
            first = [self._descend(problem, head, layers=1)[1] for head in heads]
            order = sorted(range(len(heads)), key=lambda i: first[i][0]["residual"] if first[i] else 0.0)
            heads = [heads[i] for i in order]
        found: list[_Trial] = []
        for index, head in enumerate(heads):
            x, rows = self._descend(problem, head)
            if bool(torch.isfinite(x).all()):
                found.append(problem.trial(x, head, rows))
                if found[-1].loss < _PERFECT:
                    # Another candidate can only match as well if the model is homogeneous, and its picture is then
                    # this one scaled.
                    for other in heads[index + 1 :]:
                        scale = (other.x @ head.x) / head.x.square().sum()
                        found.append(problem.trial(scale * x, other, rows))
                    break
        return found

    def _descend(self, problem: _Problem, head: Head, layers: int | None = None) -> tuple[Tensor, list[dict[str, Any]]]:
        """The recursion from `head` to the input, and a row for each solved layer. `layers`: stop after so many."""
        x, k = head.x, problem.start.backward(head.k, problem.parameters)
        rows: list[dict[str, Any]] = []
        worst = 0.0
        doubts: list[tuple[int, float]] = []
        known: Tensor | None = None  # which elements of `x` are, where a ReLU hides some of them
        for step in reversed(problem.chain.steps[: problem.start_index]):
            if len(rows) == layers:
                break
            if isinstance(step, Affine):
                z = x - step.offset(problem.parameters)
                x, k, row = self._settled(problem, step, z, k, doubts, worst, known)
                rows.append(row)
                worst, doubts, known = max(worst, row["residual"]), [], None
                k = step.backward(k, problem.parameters)
            elif isinstance(step, MeanPool):
                x, row = self._unpooled(step, x, known)
                known = None
                rows.append(row)
                # What least norm makes up can contradict nothing above: no doubt is worth trying below.
                worst, doubts, k = max(worst, row["residual"]), [], step.backward(k)
            elif isinstance(step, ChannelScale):
                x, k = step.inverse(x, problem.parameters), step.backward(k, problem.parameters)
            elif isinstance(step, Activation):
                margin = _REACH * max(worst, _EXACT) * float(x.square().mean().sqrt())
                if rows:
                    rows[-1]["outside"] = float(step.outside(x, margin).double().mean())
                if step.flat:
                    here = step.known(x, margin)
                    x, k = torch.where(here, x, 0.0), torch.where(here, k, 0.0)
                    known = here if known is None else here & known
                else:
                    x = step.inverse(x)
                    k = k * step.derivative(x)
                    doubts = doubts or _doubts(step, x, max(worst, _SINGLE))
            else:
                x, k = x.reshape(step.input_shape), k.reshape(step.input_shape)
                known = None if known is None else known.reshape(step.input_shape)
        return x, rows

    def _settled(
        self,
        problem: _Problem,
        layer: Affine,
        z: Tensor,
        k: Tensor,
        doubts: list[tuple[int, float]],
        worst: float,
        known: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A layer's input, its `k`, and the row for the report.

        Where the equations contradict each other more than those of the layers above (`worst`), the units of `doubts`
        are tried on the other side of their kink, nearest first, and stay there if the contradiction gets less.
        """

        def solve(k: Tensor) -> tuple[Tensor, dict[str, Any]]:
            weight, sent = problem.parameters[layer.weight], problem.sent.get(layer.weight)
            system = LayerSystem.of(layer, weight, k, z, sent, known)
            return _solved(system, known, damping=self.damping, max_iterations=self.max_iterations)

        x, row = solve(k)
        for unit, factor in doubts:
            if row["residual"] <= 10 * max(worst, _EXACT):
                break
            other = k.flatten().index_fill(0, torch.tensor(unit, device=k.device), float(k.flatten()[unit]) * factor)
            other_x, other_row = solve(other.reshape(k.shape))
            if other_row["residual"] < 0.9 * row["residual"]:
                x, k, row = other_x, other.reshape(k.shape), other_row | {"crossed": row["crossed"] + 1}
        return x, k, row

    def _unpooled(self, pool: MeanPool, y: Tensor, known: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """The picture of least norm with the means `y` (where `known`, if that is given), and its row."""
        seen = torch.ones_like(y) if known is None else known.to(y.dtype)

        def matvec(v: Tensor) -> Tensor:
            return (pool(v.reshape(pool.input_shape)) * seen).reshape(1, -1)

        def rmatvec(u: Tensor) -> Tensor:
            return pool.backward(u.reshape(pool.output_shape) * seen).reshape(1, -1)

        operator = LinearOperator(matvec, rmatvec, (1, pool.outputs, pool.unknowns), y)
        means = int(seen.sum())
        row = {"layer": pool.name, "unknowns": pool.unknowns, "weight_constraints": means, "gradient_constraints": 0}
        row |= {"rank_bound": min(pool.unknowns, means), "hidden": pool.outputs - means}
        x, solution = _least_squares(
            operator, (y * seen).reshape(1, -1), damping=0.0, max_iterations=self.max_iterations
        )
        return x.reshape(pool.input_shape), row | solution


def _note(rows: list[dict[str, Any]]) -> str:
    """What the rows say, in a sentence: empty if every layer was determined by count."""
    short = [f"{row['layer']!r} (at least {row['unknowns'] - row['rank_bound']})" for row in rows if _is_short(row)]
    if not short:
        return ""
    return (
        f"The equations do not determine the input of {', '.join(short)} of so many unknowns; the solution of least "
        "norm was taken, and what lies below follows from it."
    )


def _is_short(row: dict[str, Any]) -> bool:
    return row["rank_bound"] < row["unknowns"]


@dataclass(frozen=True)
class _Trial:
    """A candidate's picture `x`, the targets it assumes or implies, its matching loss and its report's rows."""

    loss: float
    x: Tensor
    targets: Tensor | None
    head: Head
    rows: list[dict[str, Any]]


def _doubts(step: Activation, z: Tensor, error: float) -> list[tuple[int, float]]:
    """The units of `z` so near to a kink that an error of relative size `error` may have put them on the wrong side.

    Nearest first, with the factor by which `k` changes across. CNN6 has 17,000 units, and in two of sixty float32
    gradients one of them ends up there; a `k` that is wrong by a factor of five in one place spoils all layers below.
    """
    if step.kink is None:
        return []
    distance = (z - step.kink).abs().flatten()
    reach = _REACH * error * float(z.square().mean().sqrt())
    near = torch.nonzero(distance <= reach).flatten()
    if len(near) > _MOST_DOUBTS:  # noise, not rounding: trying them all would settle nothing
        return []
    factors = (step.derivative(2 * step.kink - z) / step.derivative(z)).flatten()
    return [(int(unit), float(factors[unit])) for unit in near[distance[near].argsort()]]


def _solved(
    system: LayerSystem, known: Tensor | None, *, damping: float, max_iterations: int
) -> tuple[Tensor, dict[str, Any]]:
    """The input of a layer by least squares, of least norm where it is not determined, and its row for the report."""
    layer = system.layer
    hidden = 0 if known is None else int((~known).sum())
    row = {
        "layer": layer.name,
        "unknowns": layer.unknowns,
        "weight_constraints": layer.outputs - hidden,
        "gradient_constraints": system.gradient_constraints,
        "rank_bound": layer.rank_bound(gradients=system.gradient_constraints > 0, known=known),
        "hidden": hidden,
    }
    x, solution = _least_squares(system.operator, system.target, damping=damping, max_iterations=max_iterations)
    return x.reshape(layer.input_shape), row | solution


def _least_squares(
    operator: LinearOperator, target: Tensor, *, damping: float, max_iterations: int
) -> tuple[Tensor, dict[str, Any]]:
    """The solution, and what its row says about how it was found."""
    solution = cgls(operator, target, damping=damping, max_iterations=max_iterations)
    remainder = torch.linalg.vector_norm(operator.matvec(solution.solution) - target)
    length = torch.linalg.vector_norm(target)
    return solution.solution, {
        "residual": float(remainder / length) if length > 0 else 0.0,
        "iterations": solution.iterations,
        "solved": bool(solution.converged.all()),
        "outside": 0.0,
        "crossed": 0,
    }


class _Problem:
    """An observation of one example in float64, its model as a chain, and where the recursion starts.

    `start_index`: of the layer in the chain's steps; `kind`: how its input is found, "bias", "logistic" or "softmax".
    Raises what `RGAP.check` raises.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation.in_dtype(torch.float64)
        self.function = self.observation.loss_gradient
        self.sent = self.observation.sent
        self.chain = walk(self.function, observation.input_shape)
        self.parameters = all_parameters(self.function)
        labels = self.observation.labels
        self.labels = None if labels is None else self.function.cast(labels)
        self.last = self.chain.layers[-1]
        self.start_index, self.kind = self._start()
        start = self.chain.steps[self.start_index]
        assert isinstance(start, Affine)
        self.start = start
        self.chain.check_invertible(self.start_index, partly=True)

    def top(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss as a function of the last layer's output, shape `(1, C)`."""
        values = self.chain(outputs[0], self.parameters, start=self.chain.affine_indices[-1] + 1)
        return self.function.loss_fn(values[None], targets)

    def heads(self) -> list[Head]:
        """The candidates for the start."""
        weight, weight_gradient = self.parameters[self.start.weight], self.sent[self.start.weight]
        if self.kind == "bias":
            assert self.start.bias is not None
            return [bias_head(weight_gradient, self.sent[self.start.bias])]
        if self.kind == "logistic":
            return logistic_heads(weight, weight_gradient, logistic_targets(self.top, self.labels, weight))
        return softmax_heads(weight, weight_gradient, self.labels)

    def trial(self, x: Tensor, head: Head, rows: list[dict[str, Any]]) -> _Trial:
        """`x` as a candidate, with its matching loss (`nan` if the loss's targets are unknown)."""
        targets = self._targets(x, head)
        loss = math.nan if targets is None else self.observation.matching_loss(x[None], targets)
        if targets is not None and math.isnan(loss):
            loss = math.inf  # an overflow; nan would win every comparison
        return _Trial(loss, x, targets, head, rows)

    def choose(self, found: list[_Trial]) -> tuple[_Trial, int]:
        """The candidate with the lowest matching loss, and how many others match as well.

        Twins (Zhu & Blaschko 2021, section 3.1): without biases, LeakyReLU makes a model homogeneous, and the pictures
        of both margins have the same gradient. Only what valid pictures look like tells them apart: the one that keeps
        to the value range, the brighter of two that do; the smaller one if no range is known.
        """
        if len(found) == 1:
            return found[0], 0
        lowest = min(trial.loss for trial in found)
        equals = [trial for trial in found if trial.loss <= 10 * lowest + _PERFECT]
        return min(equals, key=self._implausibility), len(equals) - 1

    def _implausibility(self, trial: _Trial) -> tuple[float, float]:
        size = float(torch.linalg.vector_norm(trial.x))
        if self.observation.value_range is None:
            return 0.0, size
        low, high = self.observation.value_range
        excess = float(torch.linalg.vector_norm(trial.x - trial.x.clamp(low, high)))
        return max(excess / size if size else 0.0, 1e-3), -size

    def _targets(self, x: Tensor, head: Head) -> Tensor | None:
        """What the loss was given: known, assumed by the candidate, or read off the outputs' gradient at `x`."""
        if self.labels is not None or head.targets is not None:
            return self.labels if self.labels is not None else head.targets
        if self.last.kind != "Linear" or self.last.weight not in self.sent:
            return None
        features = self.chain(x, self.parameters, stop=self.chain.affine_indices[-1])
        k = self.sent[self.last.weight] @ features / features.square().sum()
        return recover_targets(self.top, k)

    def _start(self) -> tuple[int, str]:
        """The lowest linear layer with a bias: its input follows from its own gradient, so nothing above it matters."""
        for index in self.chain.affine_indices:
            layer = self.chain.steps[index]
            assert isinstance(layer, Affine)
            sent = layer.weight in self.sent and layer.bias in self.sent
            if layer.kind == "Linear" and sent and bool(self.sent[str(layer.bias)].any()):
                return index, "bias"
        last = self.last
        subject = f"R-GAP cannot start at the last layer, {last.name!r} ({last.kind}):"
        if last.kind != "Linear":
            raise UnsupportedModelError(
                f"{subject} the loss's derivative by each output does not follow from the gradient of a "
                "convolution. End the model with Flatten and Linear, or attack by gradient matching."
            )
        if last.weight not in self.sent:
            raise UnsupportedModelError(
                f"{subject} its weight is frozen, so no gradient of it is sent. Attack by gradient matching."
            )
        if not bool(self.sent[last.weight].any()):
            raise InputError(f"The sent gradient of {last.weight!r} is zero: nothing about the input follows from it.")
        if last.bias is not None:
            raise UnsupportedModelError(
                f"{subject} its bias is frozen or its gradient zero, and the equations for a layer without a bias do "
                "not hold with one. Attack by gradient matching."
            )
        index = self.chain.affine_indices[-1]
        like = self.parameters[last.weight]
        if last.filters == 1 and logistic_targets(self.top, self.labels, like):
            return index, "logistic"
        label = torch.zeros(1, dtype=torch.int64, device=like.device) if self.labels is None else self.labels
        if last.filters > 1 and is_softmax_cross_entropy(self.top, last.filters, label):
            return index, "softmax"
        raise UnsupportedModelError(
            f"{subject} it has no bias, and the loss is neither the binary logistic loss of one output "
            "(nn.BCEWithLogitsLoss, nn.SoftMarginLoss) nor softmax cross-entropy, whose equations are known. With a "
            "bias in this layer any loss works; otherwise attack by gradient matching."
        )
