"""L-BFGS on `T` problems at once: all trials advance together, each at its own step length.

Source: Nocedal & Wright 2006, algorithms 7.4 and 7.5; the line search is the weak-Wolfe bisection of
Lewis & Overton 2013. One evaluation of all trials is one tick: a trial whose point satisfies the Wolfe conditions
moves there and turns, the others change their step length. There is no inner loop and nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.linalg.operator import safe_inverse

#: `(T, n) -> values (T,), gradients (T, n)`.
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

ARMIJO, CURVATURE = 1e-4, 0.9
MAX_STEPS = 25  # evaluations in one line search


@dataclass(frozen=True)
class Minima:
    """`points`: `(T, n)`; `values`: `(T,)`; `evaluations`: ticks; `converged`: `(T,)`, by value or by gradient."""

    points: Tensor
    values: Tensor
    evaluations: int
    converged: Tensor


class _Memory:
    """The last `size` pairs `(s, y)` of each trial, a ring per trial."""

    def __init__(self, start: Tensor, size: int) -> None:
        trials, n = start.shape
        self.s = start.new_zeros(size, trials, n)
        self.y = start.new_zeros(size, trials, n)
        self.rho = start.new_zeros(size, trials)
        self.next = torch.zeros(trials, dtype=torch.int64, device=start.device)
        self.rows = torch.arange(trials, device=start.device)
        self.scale = torch.ones_like(start[:, 0])

    def push(self, s: Tensor, y: Tensor, which: Tensor) -> None:
        """Store the pair of the trials in `which`; an empty slot has `rho = 0` and does nothing."""
        product = (s * y).sum(-1)
        which = which & (product > torch.finfo(s.dtype).eps * (y * y).sum(-1))
        slot = (self.next, self.rows)
        self.s[slot] = torch.where(which[:, None], s, self.s[slot])
        self.y[slot] = torch.where(which[:, None], y, self.y[slot])
        self.rho[slot] = torch.where(which, safe_inverse(product), self.rho[slot])
        self.scale = torch.where(which, product * safe_inverse((y * y).sum(-1)), self.scale)
        self.next = torch.where(which, (self.next + 1) % len(self.s), self.next)

    def forget(self, which: Tensor) -> None:
        """Drop the pairs of the trials in `which`."""
        self.rho = torch.where(which[None], torch.zeros_like(self.rho), self.rho)
        self.scale = torch.where(which, torch.ones_like(self.scale), self.scale)

    def times(self, gradient: Tensor) -> Tensor:
        """The two-loop recursion: an approximate inverse Hessian times `gradient`."""
        size = len(self.s)
        q, alphas = gradient, []
        order = [((self.next - 1 - k) % size, self.rows) for k in range(size)]
        for slot in order:
            alpha = self.rho[slot] * (self.s[slot] * q).sum(-1)
            q = q - alpha[:, None] * self.y[slot]
            alphas.append(alpha)
        r = self.scale[:, None] * q
        for slot, alpha in zip(reversed(order), reversed(alphas), strict=True):
            beta = self.rho[slot] * (self.y[slot] * r).sum(-1)
            r = r + (alpha - beta)[:, None] * self.s[slot]
        return r


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
    """Minimise `T` functions from `start` `(T, n)`.

    `evaluations`: how often `function` is called, each time for all trials. A trial ends when its value is at most
    `target`, its gradient's largest element at most `tolerance`, or no step makes progress any more.
    `stop_at_first`: end everything as soon as one trial reaches `target`. A non-finite value counts as a step too long.
    """
    x = start.clone()
    value, gradient = function(x)
    pairs = _Memory(x, memory)
    direction = -gradient
    step = (1 / gradient.abs().sum(-1).clamp_min(1e-30)).clamp_max(1.0)
    low, high = torch.zeros_like(value), torch.full_like(value, float("inf"))
    tries = torch.zeros_like(pairs.next)
    fresh = torch.ones_like(value, dtype=torch.bool)  # the direction is steepest descent
    stalled = ~torch.isfinite(value)
    tick = 1
    while tick < evaluations:
        tick += 1
        trial = x + step[:, None] * direction
        new_value, new_gradient = function(trial)
        finite = torch.isfinite(new_value) & torch.isfinite(new_gradient).all(-1)
        slope = (gradient * direction).sum(-1)
        enough = finite & (new_value <= value + ARMIJO * step * slope)
        turned = (torch.where(finite[:, None], new_gradient, gradient) * direction).sum(-1) >= CURVATURE * slope
        tries = tries + 1
        worn = tries >= MAX_STEPS
        live = ~_ended(value, gradient, target, tolerance) & ~stalled
        accept = live & enough & (turned | worn)
        failed = live & worn & ~enough

        pairs.push(trial - x, torch.where(finite[:, None], new_gradient - gradient, torch.zeros_like(x)), accept)
        # A failed line search drops what was learnt and starts over; failing from there is the end.
        stalled = stalled | (failed & fresh)
        pairs.forget(failed)
        x = torch.where(accept[:, None], trial, x)
        value = torch.where(accept, new_value, value)
        gradient = torch.where(accept[:, None], new_gradient, gradient)

        restart = accept | failed
        downhill = -pairs.times(gradient)
        uphill = (downhill * gradient).sum(-1) >= 0
        downhill = torch.where((uphill | failed)[:, None], -gradient, downhill)
        direction = torch.where(restart[:, None], downhill, direction)
        fresh = torch.where(restart, uphill | failed, fresh)
        low = torch.where(restart, torch.zeros_like(low), torch.where(enough, step, low))
        high = torch.where(restart, torch.full_like(high, float("inf")), torch.where(enough, high, step))
        between = torch.where(torch.isfinite(high), (low + high) / 2, 2 * step)
        first = (1 / gradient.abs().sum(-1).clamp_min(1e-30)).clamp_max(1.0)
        step = torch.where(restart, torch.where(fresh, first, torch.ones_like(step)), between)
        tries = torch.where(restart, torch.zeros_like(tries), tries)

        if tick % check_every == 0:
            if stop_at_first and bool((value <= target).any()):
                break
            if bool((_ended(value, gradient, target, tolerance) | stalled).all()):
                break
    return Minima(x, value, tick, _ended(value, gradient, target, tolerance))


def _ended(value: Tensor, gradient: Tensor, target: float, tolerance: float) -> Tensor:
    return (value <= target) | (gradient.abs().amax(-1) <= tolerance)
