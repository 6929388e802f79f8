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
from torch import Tensor

from gradguard.attacks._closed_form.determined import determines
from gradguard.attacks._closed_form.given_labels import check_differentiable, with_usable_labels
from gradguard.attacks._closed_form.heads import Head
from gradguard.attacks._closed_form.rgap_batch import Recovered, check_batch, examples, first_layer, recovered
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
    bias (ReLU), those that are proved first, and one combination in the place of the others. A group of units that
    agrees on an input is an example only if the signals of several could not agree as well, which they do under a
    two-class softmax, one output, a head of low rank, or a flat one (see `batch_proof`). `details["exact"]` and
    `details["units"]` say how many are proved and how many units agree on each; `details["candidates"]`, on how many
    inputs units agree. It has converged if all examples were found, the gradient's rank is their number, and their
    gradient is the one sent up to rounding; labels are assigned then only.

    Guarantees, if the attack has converged: no layer's relative residual is above `tolerance`, the input's own
    equations have one solution, the gradient of what was found is the one sent, and no other candidate within the value
    range matches as well. Otherwise `details["unproved"]` says in sentences what is missing. Not guaranteed: that
    targets are of the kind assumed where none are given (class indices, 0 and 1).

    `details["layers"]` has one row per solved layer, last first: `layer`, `unknowns`, `weight_constraints`,
    `gradient_constraints`, `rank_bound` (what they can at most determine), `residual` (relative, rows scaled),
    `iterations`, `solved` (the iteration ended before its limit), `hidden` (outputs that a ReLU above hides), `outside`
    (the share of the solution that is no value of the activation below, and was moved to the nearest), `damping`,
    `ambiguous` (units of the activation above whose value has two arguments), `crossed` (units moved to the other side
    of its kink, or to its other branch, because the equations then contradict each other less). A layer with a
    `rank_bound` below its `unknowns` gets the solution of least norm; the layers below it then show large residuals.
    `details["short"]` names these layers, and the attack has not converged if there is one; `details["note"]` says so
    in words. `details["twins"]`: how many other pictures have the same gradient, which only the value range tells from
    the one returned.

    Args:
        tolerance: The attack has converged if no layer's relative residual is above it, and the matching loss not above
            its square. Positive.
        damping: `lambda` in `min |A x - b|^2 + lambda^2 |x|^2` per layer, for rows of norm 1. By default each layer's
            is what its equations leave over (`rgap_layer.natural_damping`): nothing for an exact gradient, and what
            keeps a noisy one from blowing up.
        max_iterations: Per layer; a layer that is determined seldom needs a thousand.

    Raises:
        InputError: If a value is outside its range.
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
        """Whether the attack can work on the observation, before any work.

        Args:
            observation: What the attacker sees.

        Raises:
            InputError: For a batch on convolutions, a zero gradient, or labels that the loss does not take.
            UnsupportedModelError: For a model that is no chain, or where the recursion cannot start.
        """
        if observation.batch_size > 1:
            check_batch(observation, walk(observation.loss_gradient, observation.input_shape))
        chain = walk(observation.loss_gradient, observation.input_shape, residual=True)
        observation = with_usable_labels(observation)
        check_differentiable(observation)
        Problem(_as_one(observation), chain)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack. It draws no random numbers.

        Args:
            observation: What the attacker sees.
            generator: Not used.

        Returns:
            The inputs `(B, *input_shape)`, the labels where they follow, and in `details` what the class describes; no
            inputs if no candidate gave finite values.
        """
        observation = with_usable_labels(observation)
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
        unproved = problem.unproved(best, found, self._open_layers(problem, best, short), self.tolerance)
        return Reconstruction(
            attack=self.name,
            inputs=best.x[None],
            labels=best.targets,
            matching_loss=best.loss,
            converged=residual <= self.tolerance
            and all(row["solved"] for row in best.rows)
            and not (short or unproved),
            details=details
            | {"candidate": best.head.origin, "twins": twins, "residual": residual, "layers": best.rows}
            | {"short": short, "unproved": unproved, "note": " ".join(filter(None, [_note(best.rows), *unproved]))},
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
        known = recovered(observation, chain, found)
        parts = [known.inputs]
        if len(known.inputs) < count:
            rest = found.candidates.mean(0) if found.combination is None else found.combination
            parts.append(rest.expand(count - len(known.inputs), -1))
        whole = known.labels is not None
        inputs, labels = chain.undone(torch.cat(parts)), known.labels
        if labels is not None and observation.labels is not None:
            order = _matched(labels, observation.labels)
            inputs, labels, known = inputs[order], observation.labels, replace(known, units=known.units[order])
        details = {"start": layer.name, "exact": known.proved, "units": known.units[: known.proved].tolist()}
        return Reconstruction(
            attack=self.name,
            inputs=inputs,
            labels=labels,
            converged=whole,
            details=details | {"candidates": len(known.inputs), "note": _batch_note(known, count, layer.name)},
        )

    def _trials(self, problem: Problem, heads: list[Head]) -> list[Trial]:
        """Every candidate that gives finite values, with its matching loss."""
        descents = _likeliest_first([self._descent(problem, head) for head in heads])
        found: list[Trial] = []
        for index, descent in enumerate(descents):
            head, (x, rows) = descent.head, descent.finish()
            if bool(torch.isfinite(x).all()):
                found.append(problem.trial(x, head, rows, tuple(descent.systems)))
                if found[-1].loss < PERFECT:
                    # Another candidate can only match as well if the model is homogeneous, and its picture is then
                    # this one scaled.
                    for other in (d.head for d in descents[index + 1 :]):
                        scale = (other.x @ head.x) / head.x.square().sum()
                        found.append(problem.trial(scale * x, other, rows, tuple(descent.systems)))
                    break
        return found

    def _open_layers(self, problem: Problem, best: Trial, short: list[str]) -> list[str]:
        """The layers that do not determine their input although they are not `short`.

        What a higher layer leaves open the layers below contradict, and so does the gradient of what was found; so only
        the lowest is looked at, and all of them where the matching loss is unknown.

        Returns:
            Their names.
        """
        systems = best.systems if math.isnan(best.loss) else best.systems[-1:]
        with few_threads(problem.chain.layers):
            return [
                name
                for name, system in systems
                if name not in short and not determines(system, max_iterations=self.max_iterations)
            ]

    def _descent(self, problem: Problem, head: Head) -> Descent:
        """The way down from one candidate."""
        solver = LayerSolver(damping=self.damping, max_iterations=self.max_iterations, tolerance=self.solver_tolerance)
        return Descent(problem, head, solver)


def _likeliest_first(descents: list[Descent]) -> list[Descent]:
    """By what the first layer that is solved leaves over, where a wrong candidate shows: that saves the others' solves.

    None is looked at beyond one that explains it exactly.

    Returns:
        The descents, likeliest first.
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


def _matched(found: Tensor, given: Tensor) -> Tensor:
    """The order in which the labels `found` are the labels `given`, as sets they are equal."""
    order, free = [], list(range(len(found)))
    for label in given.to(found.dtype):
        place = next((i for i in free if torch.equal(found[i], label)), free[0])
        free.remove(place)
        order.append(place)
    return torch.tensor(order)


def _batch_note(known: Recovered, count: int, layer: str) -> str:
    """What is claimed of a batch, in words."""
    note = f"{known.proved} of {count} examples alone activate units of {layer!r}, and are exact."
    if known.proved == count:
        return note if known.labels is not None else f"{note} The gradient of all of them is not just the one sent."
    if len(known.inputs) > known.proved:
        note += (
            f" {len(known.inputs) - known.proved} more on which units agree may be examples or combinations of them: "
            "the signal that comes back to these units cannot tell."
        )
    if len(known.inputs) < count:
        note += " The others' places hold one combination of them."
    return note


def _note(rows: list[dict[str, Any]]) -> str:
    """What the rows say, in a sentence: empty if every layer was determined by count."""
    short = [f"{row['layer']!r} (at least {row['unknowns'] - row['rank_bound']})" for row in rows if is_short(row)]
    if not short:
        return ""
    return (
        f"The equations do not determine the input of {', '.join(short)} of so many unknowns; the solution of least "
        "norm was taken, and what lies below follows from it."
    )
