"""One layer of R-GAP's recursion: its input by least squares, and what is done where the equations are not exact.

Two things go wrong on the way down. Noise is amplified where the system has small singular values, against which there
is damping. And units end up on the wrong side of an activation's kink, or on the wrong branch of one that is not
one-to-one: their `k` is then wrong by a factor, which noise a thousand times smaller brings about, and all layers below
suffer. The equations are more than the unknowns, so a wrong side shows in what they leave over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradguard.attacks._closed_form.rgap_sides import Sides
from gradguard.chain import Affine, LayerSystem, MeanPool
from gradguard.linalg import LinearOperator
from gradguard.linalg.cgls import cgls

#: Relative residual of a layer whose equations are exact, as they are solved.
EXACT = 1e-8
#: Times that the doubtful units are put on the side that fits better, at most.
_ROUNDS = 12
#: Share of the contradiction that a move may leave to be kept: noise alone makes some moves look a little better.
_LESS = 0.97
#: Part of a move to the other side that must be wanted for it to be tried.
_LEAST_SHARE = 0.1
#: Damping that cannot be told from none.
_NO_DAMPING = 1e-5
#: Fewest degrees of freedom, as a share of the equations, that the noise is estimated from.
_FREEDOM = 0.05


@dataclass(frozen=True)
class Solved:
    """A layer's input `x`, in its shape, the `z` and `k` it was found from, the system and the report's row."""

    x: Tensor
    z: Tensor
    k: Tensor
    system: LayerSystem
    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LayerSolver:
    """How the layers are solved. `damping`: `None` for automatic; `tolerance`: of the least-squares iteration."""

    damping: float | None
    max_iterations: int
    tolerance: float | None

    def settled(
        self,
        layer: Affine,
        weight: Tensor,
        sent: Tensor | None,
        z: Tensor,
        k: Tensor,
        *,
        known: Tensor | None = None,
        sides: Sides | None = None,
        worst: float = 0.0,
        start: Solved | None = None,
    ) -> Solved:
        """The layer's input, with doubtful units on the side that explains most and automatic damping.

        `sent`: the weight's gradient, `None` if it was not; `known`: which outputs are; `worst`: the largest relative
        residual of the layers above; `start`: `solve`'s answer, where it is at hand.
        """
        # A wrong side is found by the contradiction it causes, which damping would hide.
        solved = start or self.solve(layer, weight, sent, z, k, known=known, damping=self.damping or 0.0)
        if sides is not None:
            solved = self._on_better_sides(solved, sides, worst, weight, sent, known)
        if self.damping is not None:
            return solved
        damping = 0.0
        for _ in range(2):  # the first estimate is of a solution that may have blown up
            before, damping = damping, natural_damping(solved)
            if damping < _NO_DAMPING or (before and before / 2 < damping < before * 2):
                break
            again = self.solve(layer, weight, sent, solved.z, solved.k, known=known, damping=damping)
            kept = {name: solved.row[name] for name in ("crossed", "ambiguous")}
            solved = replace(again, row=again.row | kept)
        return solved

    def solve(
        self,
        layer: Affine,
        weight: Tensor,
        sent: Tensor | None,
        z: Tensor,
        k: Tensor,
        *,
        known: Tensor | None = None,
        damping: float = 0.0,
    ) -> Solved:
        """The layer's input by least squares, of least norm where it is not determined."""
        system = LayerSystem.of(layer, weight, k, z, sent, known)
        hidden = 0 if known is None else int((~known).sum())
        row = {
            "layer": layer.name,
            "unknowns": layer.unknowns,
            "weight_constraints": layer.outputs - hidden,
            "gradient_constraints": system.gradient_constraints,
            "rank_bound": layer.rank_bound(gradients=system.gradient_constraints > 0, known=known),
            "hidden": hidden,
        }
        return self._solution(system, z, k, row, damping)

    def from_gradient(self, layer: Affine, weight: Tensor, sent: Tensor, k: Tensor) -> Solved:
        """The layer's input from its weight's gradient alone, where its output is hidden in a sum."""
        none = torch.zeros(layer.output_shape, dtype=torch.bool, device=k.device)
        system = LayerSystem.of(layer, weight, k, torch.zeros_like(k), sent, none)
        row = {
            "layer": layer.name,
            "unknowns": layer.unknowns,
            "weight_constraints": 0,
            "gradient_constraints": system.gradient_constraints,
            "rank_bound": layer.gradient_rank_bound(),
            "hidden": layer.outputs,
        }
        solved, damping = None, self.damping or 0.0
        for _ in range(1 if self.damping is not None else 3):
            solved = self._solution(system, k, k, row, damping)
            damping = natural_damping(solved)
            if damping < _NO_DAMPING:
                break
        assert solved is not None, "there is a first round"
        return solved

    def unpooled(self, pool: MeanPool, y: Tensor, known: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
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
        target = (y * seen).reshape(1, -1)
        x, solution = self._least_squares(operator, target, 0.0, None)
        residual = _share(target - operator.matvec(x), target)
        return x.reshape(pool.input_shape), row | solution | {"residual": residual}

    def _on_better_sides(
        self, solved: Solved, sides: Sides, worst: float, weight: Tensor, sent: Tensor | None, known: Tensor | None
    ) -> Solved:
        """`solved` with doubtful units moved, all that want to at once, as long as the equations contradict less."""
        layer, shape = solved.system.layer, solved.z.shape
        here = torch.stack([solved.z.flatten(), solved.k.flatten()])
        there = torch.stack([sides.z.flatten(), sides.k.flatten()])
        crossed = torch.zeros_like(here[0], dtype=torch.bool)
        for _ in range(_ROUNDS):
            residual = solved.row["residual"]
            units = sides.doubtful(max(worst, residual, EXACT))
            if residual <= EXACT or not len(units):
                break
            dz, dk = (there - here)[:, units]
            share = self._wanted(solved, units, dz if known is None else dz * known.flatten()[units], dk)
            # Where the input has adapted to one wrong unit, no more than a part of its move is still wanted.
            count = int((share > 0.5).sum()) or int(share.max() > _LEAST_SHARE)
            units = units[share.argsort(descending=True)][:count]
            while len(units):
                chosen = torch.zeros_like(crossed).index_fill(0, units, True)
                z, k = torch.where(chosen, there, here)
                other = self.solve(
                    layer, weight, sent, z.reshape(shape), k.reshape(shape), known=known, damping=self.damping or 0.0
                )
                if other.row["residual"] < _LESS * residual:
                    break
                units = units[: len(units) // 2]  # those that want it most
            else:
                break
            here, there = torch.where(chosen, there, here), torch.where(chosen, here, there)
            crossed = crossed ^ chosen
            solved = other
        return replace(solved, row=solved.row | {"crossed": int(crossed.sum()), "ambiguous": sides.ambiguous})

    def _wanted(self, solved: Solved, units: Tensor, dz: Tensor, dk: Tensor) -> Tensor:
        """How far each of `units` would go to the other side to explain what the equations leave over: 1 is all of it.

        Least squares at the input found, in which all of them share.
        """
        response = solved.system.response(solved.x, units, dz, dk)
        misfit = solved.system.misfit(solved.x)
        return cgls(response, misfit, tolerance=1e-3, max_iterations=200).solution[0]

    def _solution(self, system: LayerSystem, z: Tensor, k: Tensor, row: dict[str, Any], damping: float) -> Solved:
        """The system's solution. `row`: the report's, as far as it is known before."""
        # Columns of norm 1 save a quarter of the steps, and change nothing where there is one solution.
        determined = damping == 0 and row["rank_bound"] == row["unknowns"]
        lengths = system.column_lengths if determined else None
        x, solution = self._least_squares(system.operator, system.target, damping, lengths)
        residual = _share(system.misfit(x), system.values)
        return Solved(x.reshape(system.layer.input_shape), z, k, system, row | solution | {"residual": residual})

    def _least_squares(
        self, operator: LinearOperator, target: Tensor, damping: float, lengths: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The solution, and what its row says about how it was found. `lengths`: the columns', to be scaled to 1."""
        with torch.inference_mode():  # a thousand small steps: what autograd keeps of tensors is a tenth of their time
            found = cgls(
                operator,
                target,
                damping=damping,
                column_lengths=lengths,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                check_every=5,
            )
        return found.solution.clone(), {  # a copy, which autograd takes
            "damping": damping,
            "iterations": found.iterations,
            "solved": bool(found.converged.all()),
            "outside": 0.0,
            "crossed": 0,
            "ambiguous": 0,
        }


def _share(remainder: Tensor, of: Tensor) -> float:
    """How long `remainder` is, relative to `of`."""
    length = torch.linalg.vector_norm(of)
    return float(torch.linalg.vector_norm(remainder) / length) if length > 0 else 0.0


def natural_damping(solved: Solved) -> float:
    """The standard deviation of the equations' noise over that of the unknowns: the Bayes choice for white ones.

    The noise is what the equations leave over beyond what they determine; the unknowns' size is that of the solution.
    An exact gradient leaves rounding, so its damping is negligible.
    """
    row = solved.row
    equations = row["weight_constraints"] + row["gradient_constraints"]
    freedom = max(equations - row["rank_bound"], _FREEDOM * equations)
    noise = solved.system.misfit(solved.x).square().sum() / freedom
    size = solved.x.square().mean()
    return float((noise / size).sqrt()) if size > 0 else 0.0
