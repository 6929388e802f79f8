"""Adam on `T` problems at once, on the derivative or on its sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradguard.attacks._matching.search import Optimiser, Projection, Search, ValueAndGradient, rows_where
from gradguard.attacks._options import check_numbers, check_whole
from gradguard.errors import InputError

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
#: Where "step" decay makes the rate ten times smaller, as shares of the iterations (Geiping et al. 2020).
MILESTONES = (3 / 8, 5 / 8, 7 / 8)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba 2015), as attacks use it.

    Args:
        iterations: Steps per trial, at least 1.
        learning_rate: Positive; input units per step, about.
        sign: "hard" replaces the derivative by its sign (Geiping et al. 2020); "soft" by `tanh`, scaled so that it
            turns into the derivative itself towards the end; `None` takes it as it is.
        decay: Of the learning rate: "step" (a tenth at 3/8, 5/8 and 7/8 of the iterations), "cosine" (to zero), `None`.
        warm_up: Iterations over which the rate grows from 0, linearly.

    Raises:
        InputError: If a value is outside its range.
    """

    iterations: int = 4800
    learning_rate: float = 0.1
    sign: Literal["hard", "soft"] | None = "hard"
    decay: Literal["step", "cosine"] | None = "step"
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_numbers(iterations=self.iterations, learning_rate=self.learning_rate, warm_up=self.warm_up)
        if self.iterations < 1 or not 0 < self.learning_rate < math.inf or self.warm_up < 0:
            raise InputError(
                "`iterations` must be at least 1, `learning_rate` positive and finite, `warm_up` not negative, got "
                f"{self.iterations}, {self.learning_rate} and {self.warm_up}."
            )
        check_whole(1, iterations=self.iterations)
        check_whole(0, warm_up=self.warm_up)
        if self.sign not in ("hard", "soft", None):
            raise InputError(f'`sign` must be "hard", "soft" or None, got {self.sign!r}.')
        if self.decay not in ("step", "cosine", None):
            raise InputError(f'`decay` must be "step", "cosine" or None, got {self.decay!r}.')

    @property
    def evaluations(self) -> int:
        """One per iteration."""
        return self.iterations

    def search(self, start: Tensor, *, target: float = 0.0, project: Projection | None = None) -> Search:
        """All trials at their own step counts; each keeps the best point it met."""
        return AdamSearch(self, start, target, project)


class AdamSearch(Search):
    """The state of Adam on `T` trials.

    Args:
        options: The optimiser's options.
        start: Shape `(T, n)`.
        target: A trial with a value at most this has ended.
        project: Puts points back where they are allowed to be; `None`: everywhere is.
    """

    def __init__(self, options: Adam, start: Tensor, target: float, project: Projection | None) -> None:
        self.options, self.target = options, target
        self.project = project or (lambda points: points)
        self.x = self.project(start.clone())
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)
        self.steps = torch.zeros_like(start[:, 0])
        self.point, self.value = self.x, torch.full_like(start[:, 0], math.inf)
        self.ended = self.broken = torch.zeros(len(start), dtype=torch.bool, device=start.device)

    def begin(self, which: Tensor, start: Tensor) -> None:
        """From `start`, with nothing learnt."""
        zeros = torch.zeros_like(self.x)
        self.x = rows_where(which, self.project(start), self.x)
        self.first, self.second = rows_where(which, zeros, self.first), rows_where(which, zeros, self.second)
        self.steps = torch.where(which, torch.zeros_like(self.steps), self.steps)
        self.point = rows_where(which, self.x, self.point)
        self.value = torch.where(which, torch.full_like(self.value, math.inf), self.value)
        self.ended, self.broken = self.ended & ~which, self.broken & ~which

    def advance(self, function: ValueAndGradient) -> None:
        """Evaluate where the trials stand, then step."""
        value, gradient = function(self.x)
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        self.broken = self.broken | ~finite
        improved = finite & (value < self.value)
        self.point, self.value = rows_where(improved, self.x, self.point), torch.where(improved, value, self.value)
        self.ended = self.ended | self.broken | (self.value <= self.target)
        gradient = self._signed(gradient, (self.steps / self.options.iterations)[:, None])
        rate = self._rate(self.steps)
        self.steps = self.steps + 1
        self.first = BETA_1 * self.first + (1 - BETA_1) * gradient
        self.second = BETA_2 * self.second + (1 - BETA_2) * gradient * gradient
        # 1 - beta^steps, without its cancellation in float32.
        first, second = (-torch.expm1(self.steps * math.log(beta))[:, None] for beta in (BETA_1, BETA_2))
        size = (self.second / second).sqrt() + EPSILON
        moved = self.project(self.x - rate[:, None] * self.first / first / size)
        self.x = rows_where(~self.ended, moved, self.x)

    def _signed(self, gradient: Tensor, share: Tensor) -> Tensor:
        if self.options.sign == "hard":
            return gradient.sign()
        if self.options.sign == "soft":
            scale = (1 - share).clamp_min(1e-6)
            return (gradient * scale).tanh() / scale
        return gradient

    def _rate(self, steps: Tensor) -> Tensor:
        """The learning rate of trials that have taken `steps` `(T,)`."""
        rate = torch.full_like(steps, self.options.learning_rate)
        if self.options.warm_up:
            rate = rate * ((steps + 1) / self.options.warm_up).clamp_max(1)
        if self.options.decay == "step":
            for milestone in MILESTONES:
                rate = torch.where(steps >= int(milestone * self.options.iterations), rate / 10, rate)
        elif self.options.decay == "cosine":
            rate = rate * (1 + torch.cos(math.pi * steps / self.options.iterations)) / 2
        return rate
