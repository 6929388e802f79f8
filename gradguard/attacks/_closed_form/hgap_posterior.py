"""H-GAP's posterior: what a layer's equations do not see, and what the layers below and the prior make of it.

Source: Garcia-Fernandez et al. 2015 (IEEE TSP 63(20)), posterior linearisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradguard.attacks._closed_form.rgap_problem import Problem
from gradguard.chain import Activation
from gradguard.linalg import LinearOperator
from gradguard.linalg.cgls import cgls
from gradguard.linalg.covariances import PowerLawPrior

#: Share of an activation's variance that is not on its line above which the unit is undecided (LeakyReLU: 3 sigma).
_BENT = 1e-4
#: Standard deviation relative to the prior's below which it does not matter on which side of its kink a unit is: black
#: pixels put units without a bias on the kink itself.
_SHARP = 1e-4
#: Vectors that go through a layer at once.
_CHUNK = 256


def sees_all(operator: LinearOperator) -> bool:
    """Whether a random vector follows from its own equations."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, operator.shape[2], generator=generator, dtype=torch.float64).to(operator.like)
    found = cgls(operator, operator.matvec(v), tolerance=1e-10).solution
    return bool(torch.linalg.vector_norm(found - v) < 1e-3 * torch.linalg.vector_norm(v) / math.sqrt(v.numel()))


def null_space(operator: LinearOperator, expected: int, threshold: float) -> Tensor:
    """An orthonormal basis `(n, deficit)` of what one operator (`R = 1`) maps to nothing.

    Singular values below `threshold` count as zero, for rows of norm 1. `expected`: a lower bound of the deficit.
    Inverse iteration on the Gram matrix: a tenth of the time of all its eigenvectors.
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
class Found:
    """The posterior after one linearisation.

    `picture`: its mean. `arguments`: mean and variance of each activation's argument, flat. `undecided`: units whose
    line was not exact. `surprise`: mean square of the whitened misfit.
    """

    picture: Tensor
    arguments: list[tuple[Tensor, Tensor]]
    undecided: int
    surprise: float


class Below:
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
    ) -> Found:
        """The posterior given that the layer's input is `x + unseen a` for some `a`.

        `arguments`: over what each activation is linearised (`None`: over the prior). `noise`: what is added to the
        layer's input, relative to its size.
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
        return Found(picture, updated, undecided, surprise)

    def uncertainty(self) -> float:
        """The posterior's standard deviation of the picture, relative to the prior's (root mean square of both)."""
        falls = total = 0.0
        for place, rows in enumerate(self._prior_rows()):
            total += float(rows.diagonal(place * _CHUNK).sum())
            falls += float(self._known(rows, 0)[1].sum())
        return math.sqrt(max(total - falls, 0.0) / total)

    def _known(self, rows: Tensor, start: int, pull: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """By how much the layer's equations move the values before step `start`, and lower their variance.

        `rows`: of those values' covariance. `pull`: what moves them (`None`: nothing).
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
