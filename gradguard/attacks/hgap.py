"""H-GAP: R-GAP where a layer's equations have one solution, and where they have many the one that a picture explains.

Zhu & Blaschko 2021 (arXiv 2010.07733, section 4.3) name the hybrid and leave the optimisation open. Ours is the
posterior linearisation filter (Garcia-Fernandez et al. 2015, IEEE TSP 63(20)): pictures are Gaussian, every activation
below the layer is replaced by the straight line that fits it best over what is known of its argument, plus noise for
how far it is from straight, and the layer's equations are conditioned on exactly. A unit of LeakyReLU that may be on
either side of its kink is noise; once it cannot be, it is an equation more. No sign is ever chosen, so none has to be
taken back, which is what an optimisation over the signs stalls on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradguard.attacks._closed_form.heads import Head
from gradguard.attacks._closed_form.hgap_posterior import Below, linearise, null_space, sees_all
from gradguard.attacks._closed_form.rgap_descent import Descent
from gradguard.attacks._closed_form.rgap_layer import LayerSolver, Solved
from gradguard.attacks._closed_form.rgap_problem import Problem
from gradguard.attacks.rgap import RGAP
from gradguard.chain import Affine, Residual
from gradguard.errors import InputError
from gradguard.linalg import LinearOperator
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.threats.observation import Observation, Reconstruction

__all__ = ["HGAP", "linearise", "null_space"]

#: Singular values below this are none, for rows of norm 1.
_NO_EQUATION = 1e-6
#: A relative residual that nothing but rounding leaves.
_ROUNDING = 1e-12
#: Smallest standard deviation that is distinguished, relative to a layer's values.
_FINEST = 1e-6
#: Standard deviation of the picture, relative to the prior's, up to which it counts as determined.
_DETERMINED = 1e-2


@dataclass(frozen=True, kw_only=True)
class HGAP(RGAP):
    """R-GAP that goes on below a layer whose equations leave some of its input open. Deterministic.

    Where every layer is determined the answer is R-GAP's. Below the first one that is not, the layer's input is
    `x0 + N a`, with `N` a basis of what its equations do not see; `a` and the picture are found together, from the
    layers below and the prior, in some rounds of dense linear algebra (CNN6-d: 4 rounds of 2 s on one core).

    The row of a completed layer in `details["layers"]` says beside R-GAP's columns: `deficit`, the unknowns that its
    equations do not determine; `constraints`, the ones they do; `rounds`; `undecided_at_first` and `undecided`, units
    of the activations below that are not on a known straight piece; `uncertainty`, the posterior's standard deviation
    of the picture relative to the prior's; `surprise`, the mean square of what the prior did not expect, 1 for a
    prior that fits. `residual` is then that of the picture found, through all layers below. `details["deficient"]`
    names the completed layers. The attack has converged if R-GAP's condition holds, and no completed layer has
    undecided units or an `uncertainty` above 0.01.

    Args:
        prior: What pictures look like, around the middle of the value range (around 0 if there is none). Only its shape
            matters much: one that is too narrow is widened.
        rounds: Largest number of linearisations, at least 1.
        max_unknowns: Where the layer's input or a value below it is wider, R-GAP's solution stays. Time grows with the
            cube, memory with the square (some 7 matrices of that size at the worst moment, 0.7 GB for CNN6-d).
            `tolerance`, `damping` and `max_iterations` are R-GAP's.

    Raises:
        InputError: If `rounds` or `max_unknowns` is below 1.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)
    rounds: int = 20
    max_unknowns: int = 6000

    #: Full accuracy: what the layers above leave over counts as noise, and dense algebra takes longer anyway.
    solver_tolerance: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise InputError(f"`rounds` must be at least 1, got {self.rounds}.")
        if self.max_unknowns < 1:
            raise InputError(f"`max_unknowns` must be at least 1, got {self.max_unknowns}.")

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack. It draws no random numbers."""
        result = super().run(observation, generator)
        if observation.batch_size > 1:
            return result
        rows = result.details.get("layers", [])
        completed = [row for row in rows if "deficit" in row]
        names = [row["layer"] for row in completed]
        left = [name for name in result.details.get("short", []) if name not in names]
        unproved = result.details.get("unproved", [])
        converged = not (left or unproved) and all(
            row["residual"] <= self.tolerance and row["solved"] and row.get("determined", True) for row in rows
        )
        note = " ".join([_note(row) for row in completed] + ([result.details["note"]] if left else unproved))
        details = result.details | {"deficient": names} | ({"note": note} if completed else {})
        return replace(result, converged=bool(rows or result.converged) and converged, details=details)

    def _descent(self, problem: Problem, head: Head) -> Descent:
        return _CompletingDescent(problem, head, super()._descent(problem, head).solver, self)

    def completed(self, problem: Problem, layer: Affine, solved: Solved, worst: float) -> Solved:
        """A layer's input as R-GAP solved it, with what its equations leave open determined by the layers below.

        Args:
            problem: The chain and what was sent.
            layer: The layer whose input is sought.
            solved: R-GAP's solution.
            worst: The largest relative residual of the layers above.

        Returns:
            The completed solution, or `solved` where nothing is open or the layer is too wide.
        """
        below = problem.chain.steps[: problem.chain.steps.index(layer) + 1]
        widest = max(math.prod(step.input_shape) for step in below)
        if any(isinstance(step, Residual) for step in below):
            return solved
        if widest > self.max_unknowns or not bool(solved.x.isfinite().all() & solved.k.isfinite().all()):
            return solved
        row, operator = solved.row, solved.system.operator
        if row["rank_bound"] == row["unknowns"] and sees_all(operator):
            return solved
        unseen = null_space(operator, row["unknowns"] - row["rank_bound"], max(_NO_EQUATION, row["damping"]))
        if unseen.shape[1] == 0:
            return solved
        noise = max(_FINEST, worst, row["residual"])
        x, completion = self._completed(problem, layer, operator, solved.x.flatten(), unseen, noise)
        return replace(solved, x=x, row=row | completion)

    def _completed(
        self,
        problem: Problem,
        layer: Affine,
        operator: LinearOperator,
        x: Tensor,
        unseen: Tensor,
        noise: float,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The layer's input `x + unseen a`, and what the report's row says of it."""
        below = Below(problem, problem.chain.steps.index(layer), self.prior)
        target = operator.matvec(x[None])
        length = torch.linalg.vector_norm(target).clamp_min(torch.finfo(x.dtype).tiny)
        found = below.condition(x, unseen, None, noise)
        surprise = found.surprise
        if surprise > 1:
            below.widen(surprise)
            found = below.condition(x, unseen, None, noise)
        picture, residual, undecided = found.picture, math.inf, list[int]()
        while True:
            undecided.append(found.undecided)
            now = torch.linalg.vector_norm(operator.matvec(below(found.picture).reshape(1, -1)) - target) / length
            ended = found.undecided == 0 and bool((now > residual / 2) | (now < _ROUNDING))
            if now < residual:
                picture, residual = found.picture, float(now)
            if ended or not below.bends or len(undecided) == self.rounds:
                break
            if found.undecided == 0:
                below.mean = picture  # the prior has done its part: what is left is rounding and `noise`
            found = below.condition(x, unseen, found.arguments, noise)
        uncertainty = below.uncertainty()
        return below(picture), {
            "deficit": unseen.shape[1],
            "constraints": len(x) - unseen.shape[1],
            "rounds": len(undecided),
            "undecided_at_first": undecided[0],
            "undecided": undecided[-1],
            "uncertainty": uncertainty,
            "surprise": surprise,
            "residual": residual,
            "determined": undecided[-1] == 0 and uncertainty <= _DETERMINED,
            "picture": picture,
        }


class _CompletingDescent(Descent):
    """R-GAP's recursion through completed layers; the picture a completion came with, if it matches better."""

    def __init__(self, problem: Problem, head: Head, solver: LayerSolver, attack: HGAP) -> None:
        super().__init__(problem, head, solver)
        self.attack = attack

    def finish(self) -> tuple[Tensor, list[dict[str, Any]]]:
        x, rows = super().finish()
        pictures = [row.pop("picture") for row in rows if "picture" in row]
        if pictures:
            x = min([x, *pictures], key=lambda picture: self.problem.trial(picture, self.head, rows).loss)
        return x, rows

    def _settled(self, layer: Affine) -> Solved:
        return self.attack.completed(self.problem, layer, super()._settled(layer), self.worst)


def _note(row: dict[str, Any]) -> str:
    """What the row of a completed layer says, in a sentence."""
    what = f"The equations of {row['layer']!r} leave {row['deficit']} of {row['unknowns']} unknowns open;"
    if row["determined"]:
        return f"{what} the layers below it determine them."
    return f"{what} the layers below it do not determine them, and the rest is what the prior makes of it."
