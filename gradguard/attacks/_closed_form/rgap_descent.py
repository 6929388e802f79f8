"""R-GAP's recursion from one candidate of the last layer down to the input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradguard.attacks._closed_form.heads import Head
from gradguard.attacks._closed_form.rgap_layer import EXACT, LayerSolver, Solved
from gradguard.attacks._closed_form.rgap_problem import Problem
from gradguard.attacks._closed_form.rgap_sides import Sides
from gradguard.chain import Activation, Affine, ChannelScale, LayerSystem, MeanPool, Reshape, Residual, Rewire, Step

#: What is this many times the error away from a flat value is sure not to be it.
_FLAT = 50


class Descent:
    """The way down from `head`: `x` and `k`, the loss's derivative by it, before the step that is reached.

    `rows`: what the result says about each layer solved so far; `worst`: the largest relative residual among them;
    `systems`: their equations, by name.
    """

    def __init__(self, problem: Problem, head: Head, solver: LayerSolver) -> None:
        self.problem, self.head, self.solver = problem, head, solver
        self.steps: list[Step] = list(problem.chain.steps[: problem.start_index])
        self.x, self.k = head.x, problem.start.backward(head.k, problem.parameters)
        self.rows: list[dict[str, Any]] = []
        self.worst = 0.0
        self.systems: list[tuple[str, LayerSystem]] = []
        self._sides: Sides | None = None
        self._known: Tensor | None = None  # which elements of `x` are, where a ReLU hides some of them
        self._looked: Solved | None = None

    def look(self) -> float:
        """The relative residual of the first layer that is solved, as its equations stand; 0 if there is none."""
        while self.steps:
            step = self.steps[-1]
            if isinstance(step, Affine):
                self._looked = self.solver.solve(
                    step, *self._equations(step), known=self._known, damping=self.solver.damping or 0.0
                )
                return float(self._looked.row["residual"])
            self._pass(self.steps.pop())
            if self.rows:
                return float(self.rows[-1]["residual"])
        return 0.0

    def finish(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """The input, and the rows."""
        while self.steps:
            self._pass(self.steps.pop())
        return self.x, self.rows

    def _settled(self, layer: Affine) -> Solved:
        """A layer's input from its output and gradient."""
        sides = self._sides and replace(self._sides, z=self._sides.z - layer.offset(self.problem.parameters))
        return self.solver.settled(
            layer, *self._equations(layer), known=self._known, sides=sides, worst=self.worst, start=self._looked
        )

    def _equations(self, layer: Affine) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A layer's weight, its gradient if it was sent, output without bias, and `k`."""
        parameters = self.problem.parameters
        z = self.x - layer.offset(parameters)
        return parameters[layer.weight], self.problem.sent.get(layer.weight), z, self.k

    def _pass(self, step: Step) -> None:
        """From a step's output to its input."""
        parameters = self.problem.parameters
        if isinstance(step, Affine):
            solved = self._settled(step)
            self.x, self.k, self._looked = solved.x, step.backward(solved.k, parameters), None
            self.systems.append((step.name, solved.system))
            self._add(solved.row)
        elif isinstance(step, MeanPool):
            self.x, row = self.solver.unpooled(step, self.x, self._known)
            self.k = step.backward(self.k)
            self._add(row)
        elif isinstance(step, ChannelScale):
            self.x, self.k = step.inverse(self.x, parameters), step.backward(self.k, parameters)
            self._sides = self._sides and self._sides.through(step, parameters)
        elif isinstance(step, Rewire):
            self._pass_rewiring(step)
        elif isinstance(step, Activation):
            self._pass_activation(step)
        elif isinstance(step, Residual):
            self._pass_residual(step)
        else:
            assert isinstance(step, Reshape)
            self.x, self.k = self.x.reshape(step.input_shape), self.k.reshape(step.input_shape)
            self._known = None if self._known is None else self._known.reshape(step.input_shape)
            self._sides = self._sides and self._sides.through(step, parameters)

    def _pass_rewiring(self, step: Rewire) -> None:
        self.x, self.k = step.inverse(self.x, known=self._known), step.backward(self.k)
        self._known = None if self._known is None else step.known(self._known)
        # Of copies neither side is the other's; nothing is moved there.
        self._sides = self._sides.rewired(step) if self._sides and step.one_to_one else None

    def _pass_residual(self, block: Residual) -> None:
        """The gradient of the branch's last layer gives that layer's input, hence the branch's value and the skip's."""
        parameters, k = self.problem.parameters, self.k
        layer, after = block.branch[block.end], block.branch[block.end + 1 :]
        assert isinstance(layer, Affine), "others are refused before"
        for step in reversed(after):
            assert isinstance(step, ChannelScale | Reshape), "others are refused before"
            k = k.reshape(step.input_shape) if isinstance(step, Reshape) else step.backward(k, parameters)
        weight, sent = parameters[layer.weight], self.problem.sent[layer.weight]
        solved = self.solver.from_gradient(layer, weight, sent, k)
        self.systems.append((layer.name, solved.system))
        self._add(solved.row)
        k, self.x = self.k, self.x - block.along((layer, *after), solved.x, parameters)
        for step in reversed(block.skip):
            self._pass(step)
        pull_back: Any = torch.func.vjp(lambda x: block.along(block.branch, x, parameters), self.x)[1]
        self.k = self.k + pull_back(k)[0]

    def _pass_activation(self, step: Activation) -> None:
        margin = _FLAT * max(self.worst, EXACT) * float(self.x.square().mean().sqrt())
        if self.rows:
            self.rows[-1]["outside"] = float(step.outside(self.x, margin).double().mean())
        if step.flat:
            here = step.known(self.x, margin)
            self.x, self.k = torch.where(here, self.x, 0.0), torch.where(here, self.k, 0.0)
            self._known = here if self._known is None else here & self._known
        else:
            self.x = step.inverse(self.x)
            # What least norm made up above contradicts nothing: there is nothing to settle sides by.
            self._sides = None if any(map(is_short, self.rows)) else Sides.of(step, self.x, self.k)
            self.k = self.k * step.derivative(self.x)

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.worst, self._sides, self._known = max(self.worst, row["residual"]), None, None


def is_short(row: dict[str, Any]) -> bool:
    """Whether a layer's row says that it has fewer equations than unknowns."""
    return bool(row["rank_bound"] < row["unknowns"])
