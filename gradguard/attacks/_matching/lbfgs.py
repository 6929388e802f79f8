"""L-BFGS on `T` problems at once: all trials advance together, each at its own step length.

Source: Nocedal & Wright 2006, algorithms 7.4 and 7.5; the line search is the weak-Wolfe bisection of
Lewis & Overton 2013. One evaluation of all trials is one tick: a trial whose point satisfies the Wolfe conditions
moves there and turns, the others change their step length. There is no inner loop and nothing to wait for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.attacks._matching.search import Optimiser, Projection, Search, ValueAndGradient, rows_where
from gradguard.attacks._options import check_whole
from gradguard.errors import InputError
from gradguard.linalg.operator import safe_inverse

ARMIJO, CURVATURE = 1e-4, 0.9
MAX_STEPS = 25  # evaluations in one line search


@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimiser):
    """Limited-memory BFGS. It has no way to keep points in a box.

    Args:
        evaluations: Evaluations of each trial, at least 1.
        memory: Pairs kept per trial, at least 1.
        tolerance: A trial ends when no element of its derivative is larger.

    Raises:
        InputError: If a value is outside its range.
    """

    evaluations: int = 300
    memory: int = 20
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        check_whole(1, evaluations=self.evaluations, memory=self.memory)

    def search(self, start: Tensor, *, target: float = 0.0, project: Projection | None = None) -> Search:
        """Begin a search, every trial from its own start.

        Args:
            start: Shape `(T, n)`.
            target: A trial with a value at most this has ended.
            project: Must be `None`.

        Returns:
            The state, not advanced yet.

        Raises:
            InputError: If there is a projection.
        """
        if project is not None:
            raise InputError("L-BFGS moves freely: use Adam where inputs are to be kept in their range.")
        return LBFGSSearch(start, memory=self.memory, target=target, tolerance=self.tolerance)


class LBFGSSearch(Search):
    """The state of L-BFGS on `T` trials. A non-finite value counts as a step too long.

    Args:
        start: Shape `(T, n)`.
        memory: Pairs kept per trial.
        target: A trial with a value at most this has ended.
        tolerance: A trial ends when no element of its derivative is larger.
    """

    def __init__(self, start: Tensor, *, memory: int, target: float, tolerance: float) -> None:
        trials, n = start.shape
        self.target, self.tolerance = target, tolerance
        self.point, self.gradient = start.clone(), torch.zeros_like(start)
        self.value = torch.full_like(start[:, 0], float("inf"))
        self.direction = torch.zeros_like(start)
        self.step, self.low, self.high = (torch.zeros_like(self.value) for _ in range(3))
        self.tries = torch.zeros(trials, dtype=torch.int64, device=start.device)
        yes = torch.ones(trials, dtype=torch.bool, device=start.device)
        self.new, self.fresh = yes, yes  # not evaluated yet; the direction is steepest descent
        self.broken = self.stalled = self.ended = ~yes
        # The last pairs (s, y) of each trial, a ring per trial; an empty slot has rho = 0 and does nothing.
        self.s, self.y = start.new_zeros(trials, memory, n), start.new_zeros(trials, memory, n)
        self.rho = start.new_zeros(trials, memory)
        self.next = torch.zeros(trials, dtype=torch.int64, device=start.device)
        self.scale = torch.ones_like(self.value)

    def begin(self, which: Tensor, start: Tensor) -> None:
        """From `start`, with nothing learnt."""
        self.point = rows_where(which, start, self.point)
        self.value = torch.where(which, torch.full_like(self.value, float("inf")), self.value)
        self.direction = rows_where(which, torch.zeros_like(start), self.direction)
        self.new, self.fresh = self.new | which, self.fresh | which
        self.broken, self.stalled, self.ended = self.broken & ~which, self.stalled & ~which, self.ended & ~which
        self._forget(which)

    def advance(self, function: ValueAndGradient) -> None:
        """Try every trial's step: take it, or change its length."""
        trial = self.point + self.step[:, None] * self.direction
        value, gradient = function(trial)
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        self.broken = self.broken | (self.new & ~finite)
        first = self.new & finite
        slope = (self.gradient * self.direction).sum(-1)
        enough = finite & (value <= self.value + ARMIJO * self.step * slope)
        turned = (rows_where(finite, gradient, self.gradient) * self.direction).sum(-1) >= CURVATURE * slope
        self.tries = self.tries + 1
        worn = self.tries >= MAX_STEPS
        live = ~self.ended & ~self.new
        accept = live & enough & (turned | worn)
        failed = live & worn & ~enough

        self._push(trial - self.point, rows_where(finite, gradient - self.gradient, torch.zeros_like(trial)), accept)
        # A failed line search drops what was learnt and starts over; failing from there is the end.
        self.stalled = self.stalled | (failed & self.fresh)
        self._forget(failed)
        arrived = accept | first
        self.point = rows_where(accept, trial, self.point)
        self.value = torch.where(arrived, value, self.value)
        self.gradient = rows_where(arrived, gradient, self.gradient)

        turn = arrived | failed
        downhill = -self._times(self.gradient)
        steepest = ((downhill * self.gradient).sum(-1) >= 0) | failed | first
        self.direction = rows_where(turn, rows_where(steepest, -self.gradient, downhill), self.direction)
        self.fresh = torch.where(turn, steepest, self.fresh)
        zeros, infinite = torch.zeros_like(self.low), torch.full_like(self.high, float("inf"))
        self.low = torch.where(turn, zeros, torch.where(enough, self.step, self.low))
        self.high = torch.where(turn, infinite, torch.where(enough, self.high, self.step))
        between = torch.where(torch.isfinite(self.high), (self.low + self.high) / 2, 2 * self.step)
        short = (1 / self.gradient.abs().sum(-1).clamp_min(1e-30)).clamp_max(1.0)
        self.step = torch.where(turn, torch.where(self.fresh, short, torch.ones_like(short)), between)
        self.tries = torch.where(turn, torch.zeros_like(self.tries), self.tries)
        self.new = self.new & ~first
        self.ended = self.converged | self.stalled | self.broken

    @property
    def converged(self) -> Tensor:
        """`(T,)`, by value or by gradient."""
        return ~self.new & ((self.value <= self.target) | (self.gradient.abs().amax(-1) <= self.tolerance))

    def _push(self, s: Tensor, y: Tensor, which: Tensor) -> None:
        """Store the pair of the trials in `which`, if its curvature is positive."""
        product, square = (s * y).sum(-1), (y * y).sum(-1)
        which = which & (product > torch.finfo(s.dtype).eps * square)
        slot = (torch.arange(len(s), device=s.device), self.next)
        self.s[slot] = rows_where(which, s, self.s[slot])
        self.y[slot] = rows_where(which, y, self.y[slot])
        self.rho[slot] = torch.where(which, safe_inverse(product), self.rho[slot])
        self.scale = torch.where(which, product * safe_inverse(square), self.scale)
        self.next = torch.where(which, (self.next + 1) % self.s.shape[1], self.next)

    def _forget(self, which: Tensor) -> None:
        """Drop the pairs of the trials in `which`."""
        self.rho = rows_where(which, torch.zeros_like(self.rho), self.rho)
        self.scale = torch.where(which, torch.ones_like(self.scale), self.scale)

    def _times(self, gradient: Tensor) -> Tensor:
        """An approximate inverse Hessian times `gradient`, in compact form (Byrd, Nocedal & Schnabel 1994, Eq. 2.6).

        `H = c I + [S, c Y] [[R^{-T} (D + c Y^T Y) R^{-1}, -R^{-T}], [-R^{-1}, 0]] [S, c Y]^T` with `R` the upper
        triangle of `S^T Y` and `D` its diagonal: a dozen operations whatever the memory, where the two-loop recursion
        takes several for each pair. Only the small products are brought into the pairs' order, oldest first.
        """
        size = self.s.shape[1]
        order = (self.next[:, None] + torch.arange(size, device=self.next.device)) % size
        place = order.argsort(1)  # where each slot's pair stands in its order
        there = (self.rho > 0).to(gradient.dtype)
        products = (self.s @ self.y.mT) * there[:, :, None] * there[:, None, :]
        ordered = products.gather(1, order[:, :, None].expand_as(products))
        ordered = ordered.gather(2, order[:, None, :].expand_as(products))
        upper = ordered.triu() + torch.diag_embed(1 - there.gather(1, order))
        by_s, by_y = ((pairs @ gradient[..., None])[..., 0] * there for pairs in (self.s, self.y))
        u = torch.linalg.solve_triangular(upper, by_s.gather(1, order)[..., None], upper=True)[..., 0]
        u = u.gather(1, place) * there
        of_y = (self.y.mT @ u[..., None])[..., 0]
        square = (self.y @ of_y[..., None])[..., 0]
        inner = torch.diagonal(products, dim1=-2, dim2=-1) * u + self.scale[:, None] * (square - by_y)
        w = torch.linalg.solve_triangular(upper.mT, (inner * there).gather(1, order)[..., None], upper=False)[..., 0]
        w = w.gather(1, place) * there
        return self.scale[:, None] * (gradient - of_y) + (self.s.mT @ w[..., None])[..., 0]


@dataclass(frozen=True)
class Minima:
    """The best points of a search, and how it ended.

    Args:
        points: Shape `(T, n)`.
        values: Shape `(T,)`.
        evaluations: Of each trial.
        converged: Shape `(T,)`: whether by value or by gradient.
    """

    points: Tensor
    values: Tensor
    evaluations: int
    converged: Tensor


def lbfgs(
    function: ValueAndGradient,
    start: Tensor,
    *,
    evaluations: int,
    memory: int = 20,
    target: float = 0.0,
    tolerance: float = 1e-12,
    check_every: int = 10,
    stop_at_first: bool = False,
) -> Minima:
    """Minimise `T` functions.

    A trial ends when its value is at most `target`, its gradient's largest element at most `tolerance`, or no step
    makes progress any more. A non-finite value counts as a step too long.

    Args:
        function: Values `(T,)` and gradients `(T, n)` of points `(T, n)`.
        start: Shape `(T, n)`.
        evaluations: How often `function` is called, each time for all trials.
        memory: Pairs kept per trial.
        target: A value that is low enough.
        tolerance: A derivative that is small enough.
        check_every: Evaluations between two looks at whether all have ended.
        stop_at_first: End everything as soon as one trial reaches `target`.

    Returns:
        The best point and value of each trial, and how the search ended.
    """
    search = LBFGSSearch(start, memory=memory, target=target, tolerance=tolerance)
    for tick in range(1, evaluations + 1):
        search.advance(function)
        if tick % check_every == 0:
            if stop_at_first and bool((search.value <= target).any()):
                break
            if bool(search.ended.all()):
                break
    return Minima(search.point, search.value, tick, search.converged)
