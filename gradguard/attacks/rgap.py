"""R-GAP: the input in closed form, layer by layer from the last to the first.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 3. Differs from the paper in: float64 and rows of comparable
size, whatever the model's dtype; every layer matrix-free; padding known to be zero instead of solved for; every
candidate of the last layer tried, and the one kept whose gradient matches best; heads with a bias, and softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gradguard.attacks._closed_form.heads import Head
from gradguard.attacks._closed_form.rgap_batch import check_batch, examples, first_layer
from gradguard.attacks._closed_form.rgap_descent import Descent, is_short
from gradguard.attacks._closed_form.rgap_layer import EXACT, LayerSolver
from gradguard.attacks._closed_form.rgap_problem import PERFECT, Problem, Trial
from gradguard.attacks.base import Attack
from gradguard.chain import few_threads, walk
from gradguard.errors import InputError
from gradguard.threats.observation import Observation, Reconstruction


@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """The recursive attack on the gradient of one example: deterministic, no optimisation, no prior.

    For chains of Linear, Conv2d, one-to-one activations, batch normalisation in eval mode, ReLU and average pooling
    (see `gradguard.chain`). ReLU hides the outputs that are not positive: a layer below one is solved from the outputs
    that are, and its gradient. Average pooling hides all but the means, and mostly leaves the layers below short. A
    residual block is separated by the gradient of its branch's last layer, if no ReLU follows the sum. The recursion
    starts at the lowest linear layer that has a bias, under any loss; without one at the last layer, under the binary
    logistic loss (`nn.BCEWithLogitsLoss`, `nn.SoftMarginLoss`) or softmax cross-entropy. Labels are recovered if not
    given.

    Of a batch, on a chain of linear layers only, come the examples that alone activate units of a first layer with a
    bias (ReLU), exact and in no particular order, and one combination in the place of the others: `details["exact"]`
    and `details["units"]` say how many, and how many units agree on each; it has converged if all are exact. Labels are
    then not assigned, so there is no matching loss.

    `tolerance`: the attack has converged if no layer's relative residual is above it.
    `damping`: `lambda` in `min |A x - b|^2 + lambda^2 |x|^2` per layer, for rows of norm 1. By default each layer's is
        what its equations leave over (`rgap_layer.natural_damping`): nothing for an exact gradient, and what keeps a
        noisy one from blowing up.
    `max_iterations`: per layer; a layer that is determined seldom needs a thousand.

    `details["layers"]` has one row per solved layer, last first: `layer`, `unknowns`, `weight_constraints`,
    `gradient_constraints`, `rank_bound` (what they can at most determine), `residual` (relative, rows scaled),
    `iterations`, `solved` (the iteration ended before its limit), `hidden` (outputs that a ReLU above hides), `outside`
    (the share of the solution that is no value of the activation below, and was moved to the nearest), `damping`,
    `ambiguous` (units of the activation above whose value has two arguments), `crossed` (units moved to the other side
    of its kink, or to its other branch, because the equations then contradict each other less). A layer with a
    `rank_bound` below its
    `unknowns` gets the solution of least norm; the layers below it then show large residuals. `details["short"]` names
    these layers, and the attack has not converged if there is one; `details["note"]` says so in words.
    `details["twins"]`: how many other pictures have the same gradient, which only the value range tells from the one
    returned.
    """

    tolerance: float = 1e-4
    damping: float | None = None
    max_iterations: int = 10_000

    #: Of the least-squares iterations: a picture at 160 dB. Full accuracy takes half as many again.
    solver_tolerance: ClassVar[float | None] = 1e-10

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise InputError(f"`tolerance` must be positive, got {self.tolerance}.")
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise InputError(f"`damping` must be None, or zero or positive and finite, got {self.damping}.")
        if self.max_iterations < 1:
            raise InputError(f"`max_iterations` must be at least 1, got {self.max_iterations}.")

    def check(self, observation: Observation) -> None:
        """Raises `InputError` for a batch on convolutions or a zero gradient, `UnsupportedModelError` for no chain."""
        if observation.batch_size > 1:
            check_batch(observation, walk(observation.loss_gradient, observation.input_shape))
        Problem(_as_one(observation))

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack. It draws no random numbers."""
        if observation.batch_size > 1:
            return self._run_batch(observation)
        problem = Problem(observation)
        heads = problem.heads()
        details: dict[str, Any] = {"start": problem.start.name, "head": problem.kind, "candidates": len(heads)}
        with few_threads(problem.chain.layers):
            found = self._trials(problem, heads)
        if not found:
            return Reconstruction(attack=self.name, details=details | {"failure": "no candidate gave finite values"})
        best, twins = problem.choose(found)
        residual = max((row["residual"] for row in best.rows), default=0.0)
        short = [row["layer"] for row in best.rows if is_short(row)]
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

    def _run_batch(self, observation: Observation) -> Reconstruction:
        """The examples that the first layer gives away, and a combination in the place of the others."""
        count = observation.batch_size
        chain = walk(observation.loss_gradient, observation.input_shape)
        layer = first_layer(observation, chain)
        if layer is None:
            combined = self.run(_as_one(observation), None)
            note = f"A combination of the {count} examples of the batch, in the place of each of them."
            inputs = None if combined.inputs is None else combined.inputs.expand(count, *observation.input_shape)
            details = combined.details | {"exact": 0, "note": f"{note} {combined.details.get('note', '')}".strip()}
            return replace(combined, inputs=inputs, labels=None, converged=False, details=details)
        sent = observation.in_dtype(torch.float64).sent
        found = examples(sent[layer.weight], sent[str(layer.bias)], count)
        exact = len(found.exact)
        parts = [found.exact]
        if exact < count:
            rest = found.exact.mean(0) if found.combination is None else found.combination
            parts.append(rest.expand(count - exact, -1))
        note = f"{exact} of {count} examples alone activate units of {layer.name!r}, and are exact."
        if exact < count:
            note += " The others' places hold one combination of them."
        return Reconstruction(
            attack=self.name,
            inputs=torch.cat(parts).reshape(count, *observation.input_shape),
            converged=exact == count,
            details={"start": layer.name, "exact": exact, "units": found.units.tolist(), "note": note},
        )

    def _trials(self, problem: Problem, heads: list[Head]) -> list[Trial]:
        """Every candidate that gives finite values, with its matching loss."""
        descents = _likeliest_first([self._descent(problem, head) for head in heads])
        found: list[Trial] = []
        for index, descent in enumerate(descents):
            head, (x, rows) = descent.head, descent.finish()
            if bool(torch.isfinite(x).all()):
                found.append(problem.trial(x, head, rows))
                if found[-1].loss < PERFECT:
                    # Another candidate can only match as well if the model is homogeneous, and its picture is then
                    # this one scaled.
                    for other in (d.head for d in descents[index + 1 :]):
                        scale = (other.x @ head.x) / head.x.square().sum()
                        found.append(problem.trial(scale * x, other, rows))
                    break
        return found

    def _descent(self, problem: Problem, head: Head) -> Descent:
        """The way down from one candidate."""
        solver = LayerSolver(damping=self.damping, max_iterations=self.max_iterations, tolerance=self.solver_tolerance)
        return Descent(problem, head, solver)


def _likeliest_first(descents: list[Descent]) -> list[Descent]:
    """By what the first layer that is solved leaves over, where a wrong candidate shows: that saves the others' solves.

    None is looked at beyond one that explains it exactly.
    """
    if len(descents) == 1:
        return descents
    looks: list[float] = []
    for descent in descents:
        looks.append(descent.look())
        if looks[-1] <= EXACT:
            break
    order = sorted(range(len(looks)), key=looks.__getitem__) + list(range(len(looks), len(descents)))
    return [descents[i] for i in order]


def _as_one(observation: Observation) -> Observation:
    """A batch's gradient as if it were one example's."""
    return observation if observation.batch_size == 1 else replace(observation, batch_size=1, labels=None)


def _note(rows: list[dict[str, Any]]) -> str:
    """What the rows say, in a sentence: empty if every layer was determined by count."""
    short = [f"{row['layer']!r} (at least {row['unknowns'] - row['rank_bound']})" for row in rows if is_short(row)]
    if not short:
        return ""
    return (
        f"The equations do not determine the input of {', '.join(short)} of so many unknowns; the solution of least "
        "norm was taken, and what lies below follows from it."
    )
