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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gradguard.attacks._closed_form.heads import Head
from gradguard.attacks._closed_form.rgap_descent import Descent
from gradguard.attacks._closed_form.rgap_layer import LayerSolver, Solved
from gradguard.attacks._closed_form.rgap_problem import Problem
from gradguard.attacks.rgap import RGAP
from gradguard.chain import Activation, Affine, Residual
from gradguard.errors import InputError
from gradguard.linalg import LinearOperator
from gradguard.linalg.cgls import cgls
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.threats.observation import Observation, Reconstruction

#: Singular values below this are none, for rows of norm 1.
_NO_EQUATION = 1e-6
#: A relative residual that nothing but rounding leaves.
_ROUNDING = 1e-12
#: Smallest standard deviation that is distinguished, relative to a layer's values.
_FINEST = 1e-6
#: Share of an activation's variance that is not on its line above which the unit is undecided (LeakyReLU: 3 sigma).
_BENT = 1e-4
#: Standard deviation relative to the prior's below which it does not matter on which side of its kink a unit is: black
#: pixels put units without a bias on the kink itself.
_SHARP = 1e-4
#: Standard deviation of the picture, relative to the prior's, up to which it counts as determined.
_DETERMINED = 1e-2
#: Vectors that go through a layer at once.
_CHUNK = 256


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
        if row["rank_bound"] == row["unknowns"] and _sees_all(operator):
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
        below = _Below(problem, problem.chain.steps.index(layer), self.prior)
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


def _sees_all(operator: LinearOperator) -> bool:
    """Whether a random vector follows from its own equations."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, operator.shape[2], generator=generator, dtype=torch.float64).to(operator.like)
    found = cgls(operator, operator.matvec(v), tolerance=1e-10).solution
    return bool(torch.linalg.vector_norm(found - v) < 1e-3 * torch.linalg.vector_norm(v) / math.sqrt(v.numel()))


def null_space(operator: LinearOperator, expected: int, threshold: float) -> Tensor:
    """An orthonormal basis of what one operator maps to nothing.

    Inverse iteration on the Gram matrix: a tenth of the time of all its eigenvectors.

    Args:
        operator: One map (`R = 1`), shape `(1, m, n)`, rows of norm 1.
        expected: A lower bound of the deficit.
        threshold: Singular values below it count as zero.

    Returns:
        Shape `(n, deficit)`.
    """
    n = operator.shape[2]
    matvec = torch.func.vmap(lambda v: operator.matvec(v[None])[0], chunk_size=_CHUNK)
    rmatvec = torch.func.vmap(lambda u: operator.rmatvec(u[None])[0], chunk_size=_CHUNK)
    gram = torch.cat([rmatvec(matvec(part)) for part in _units(n, operator.like)])
    factor = _cholesky(gram, 1e-6)
    del gram
    count = expected + 16
    while True:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(n, min(count, n), generator=generator, dtype=torch.float64).to(operator.like)
        for _ in range(4):
            basis = torch.linalg.qr(torch.cholesky_solve(basis, factor))[0]
        image = matvec(basis.mT)
        values, vectors = torch.linalg.eigh(image @ image.mT)
        nothing = values < threshold**2
        if not bool(nothing.all()) or len(values) == n:
            return basis @ vectors[:, nothing]
        count *= 2


def _units(n: int, like: Tensor) -> Iterator[Tensor]:
    """The rows of the identity, some at a time."""
    for start in range(0, n, _CHUNK):
        rows = like.new_zeros(min(_CHUNK, n - start), n)
        rows.diagonal(start).fill_(1.0)
        yield rows


@dataclass(frozen=True)
class _Found:
    """The posterior after one linearisation.

    `picture`: its mean. `arguments`: mean and variance of each activation's argument, flat. `undecided`: units whose
    line was not exact. `surprise`: mean square of the whitened misfit.
    """

    picture: Tensor
    arguments: list[tuple[Tensor, Tensor]]
    undecided: int
    surprise: float


class _Below:
    """The steps below a layer with inputs of `n` elements, as a function of a Gaussian picture. Values are flat."""

    def __init__(self, problem: Problem, stop: int, prior: PowerLawPrior) -> None:
        self.chain, self.parameters, self.stop, self.prior = problem.chain, problem.parameters, stop, prior
        self.bends = [i for i, step in enumerate(self.chain.steps[:stop]) if isinstance(step, Activation)]
        self.like = next(iter(self.parameters.values()))
        value_range = problem.observation.value_range
        middle = 0.0 if value_range is None else sum(value_range) / 2
        self.scale = 1.0
        self.mean = self.like.new_full(self.chain.input_shape, middle)
        # The first activation's argument is linear in the picture: its covariance is the same in every round.
        self.first = self.bends[0] if self.bends else stop
        half = torch.cat([self._through(rows, 0, self.first) for rows in self._prior_rows()])
        self.covariance = self._through(half.mT, 0, self.first)
        # Of the latest linearisation: the Cholesky factor of the covariance of the layer's input, what it makes of the
        # unseen directions, and the slopes of the activations, by step.
        self.root, self.seen, self.slopes = half[:0], half[:0], dict[int, Tensor]()

    def __call__(self, picture: Tensor) -> Tensor:
        """The layer's input, in its shape."""
        return self.chain(picture, self.parameters, stop=self.stop)

    def widen(self, factor: float) -> None:
        """Multiply the prior's covariance."""
        self.scale *= factor
        self.covariance = self.covariance * factor

    def condition(
        self, x: Tensor, unseen: Tensor, arguments: list[tuple[Tensor, Tensor]] | None, noise: float
    ) -> _Found:
        """The posterior given that the layer's input is `x + unseen a` for some `a`.

        Args:
            x: The input as R-GAP solved it.
            unseen: The basis of what its equations do not see, `(n, deficit)`.
            arguments: Mean and variance that each activation is linearised over (`None`: the prior's).
            noise: What is added to the layer's input, relative to its size.

        Returns:
            The posterior's mean and what goes with it.
        """
        self.root = self.root[:0]  # let go before the next one is made
        mean = self.chain(self.mean, self.parameters, stop=self.first).flatten()
        covariance, levels, undecided = self.covariance, [], 0
        for place, (i, end) in enumerate(zip(self.bends, [*self.bends, self.stop][1:], strict=True)):
            step = self.chain.steps[i]
            assert isinstance(step, Activation)
            levels.append((i, mean, covariance))
            m, v = (mean, covariance.diagonal()) if arguments is None else arguments[place]
            slope, shift, bent = linearise(step, m, v)
            self.slopes[i] = slope
            blurred = v > _SHARP**2 * covariance.diagonal().mean()
            undecided += int(((bent > _BENT * v) & blurred).sum())
            covariance = slope[:, None] * covariance * slope
            covariance.diagonal().add_(bent)
            mean = slope * mean + shift
            mean = self.chain(mean.reshape(step.output_shape), self.parameters, start=i + 1, stop=end).flatten()
            covariance = self._through(self._through(covariance, i + 1, end).mT, i + 1, end)

        if not self.bends:
            covariance = covariance.clone()
        root = self.root = _cholesky(covariance, noise)
        del covariance
        gap = x - mean
        gap = gap - unseen @ (unseen.mT @ gap)  # any `a` will do, and a small one loses no digits below
        white = torch.linalg.solve_triangular(root, torch.cat([unseen, gap[:, None]], 1), upper=False)
        self.seen, misfit = torch.linalg.qr(white[:, :-1])[0], white[:, -1]
        misfit = misfit - self.seen @ (self.seen.mT @ misfit)
        surprise = float(misfit.square().sum() / max(len(x) - unseen.shape[1], 1))
        pull = torch.linalg.solve_triangular(root.mT, misfit[:, None], upper=True)[:, 0]

        # A posterior that its data contradict is not as narrow as it says.
        doubt = max(surprise, 1.0)
        updated = []
        for i, m, c in levels:
            shifts, falls = zip(*(self._known(rows, i, pull) for rows in c.split(_CHUNK)), strict=True)
            prior = c.diagonal()
            v = torch.minimum(doubt * (prior - torch.cat(falls)), prior)
            updated.append((m + torch.cat(shifts), v.clamp_min(1e-14 * float(prior.mean()))))
        back = torch.func.vjp(
            lambda v: self._through(v[None], 0, self.stop)[0], self.like.new_zeros(self.mean.numel())
        )[1](pull)[0]
        picture = self.mean + self.scale * self.prior.apply(back.reshape(1, *self.mean.shape))[0]
        return _Found(picture, updated, undecided, surprise)

    def uncertainty(self) -> float:
        """The posterior's standard deviation of the picture, relative to the prior's (root mean square of both)."""
        falls = total = 0.0
        for place, rows in enumerate(self._prior_rows()):
            total += float(rows.diagonal(place * _CHUNK).sum())
            falls += float(self._known(rows, 0)[1].sum())
        return math.sqrt(max(total - falls, 0.0) / total)

    def _known(self, rows: Tensor, start: int, pull: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """By how much the layer's equations move the values before step `start`, and lower their variance.

        Args:
            rows: Of those values' covariance.
            start: The step.
            pull: What moves them (`None`: nothing).

        Returns:
            Both, one number per row.
        """
        rows = self._through(rows, start, self.stop)
        white = torch.linalg.solve_triangular(self.root, rows.mT, upper=False)
        fall = white.square().sum(0) - (self.seen.mT @ white).square().sum(0)
        return torch.zeros_like(fall) if pull is None else rows @ pull, fall

    def _prior_rows(self) -> Iterator[Tensor]:
        """The rows of the prior's covariance, some at a time."""
        for part in _units(self.mean.numel(), self.like):
            yield self.scale * self.prior.apply(part.reshape(-1, *self.mean.shape)).flatten(1)

    def _through(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Each of `rows` `(m, values before step start)` through the linear part of the steps from there to `stop`."""
        for i, step in enumerate(self.chain.steps[start:stop], start):
            if isinstance(step, Activation):
                rows = rows * self.slopes[i]
                continue
            offset = step(self.like.new_zeros(step.input_shape), self.parameters)

            def one(v: Tensor, step: Any = step, offset: Tensor = offset) -> Tensor:
                return (step(v.reshape(step.input_shape), self.parameters) - offset).flatten()

            rows = torch.func.vmap(one, chunk_size=_CHUNK)(rows)
        return rows


def linearise(step: Activation, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best line `slope z + shift` through an activation for Gaussian `z`, and the variance of what is off it.

    Gauss-Hermite quadrature, per element. Source: Garcia-Fernandez et al. 2015, Eq. 8-10 (statistical linear
    regression).

    Args:
        step: The activation.
        mean: Of `z`, any shape.
        variance: Of `z`, the same shape.

    Returns:
        `slope`, `shift` and the variance off the line, each in that shape.
    """
    points, masses = np.polynomial.hermite_e.hermegauss(64)
    nodes, weights = mean.new_tensor(points)[:, None], mean.new_tensor(masses / masses.sum())[:, None]
    std = variance.sqrt()
    values = step((mean + std * nodes).reshape(-1, *step.input_shape)).reshape(len(nodes), -1)
    average = (weights * values).sum(0)
    values = values - average
    slope = (weights * nodes * values).sum(0) / std
    off = ((weights * values * values).sum(0) - slope**2 * variance).clamp_min(0.0)
    return slope, average - slope * mean, off


def _cholesky(covariance: Tensor, noise: float) -> Tensor:
    """The Cholesky factor, with as much `noise` (relative standard deviation) on the diagonal as it takes."""
    size = covariance.diagonal().mean()
    while True:
        covariance.diagonal().add_(noise**2 * size)
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not bool(failed) or noise > 1:  # above 1: not for want of noise, but because of an overflow
            return root
        noise *= 10
