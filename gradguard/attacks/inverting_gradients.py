"""Inverting Gradients: the direction of the gradient, a smooth picture, and steps by sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.attacks.base import Observation
from gradguard.attacks.lbfgs import Minima
from gradguard.attacks.matching import MatchingAttack, cosine_distance, total_variation
from gradguard.errors import InputError


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(MatchingAttack):
    """Geiping et al. 2020, "Inverting gradients - how easy is it to break privacy in federated learning?"

    Minimises `1 - cosine + total_variation * TV` by Adam on the sign of the derivative, inputs kept in
    the observation's value range. `learning_rate` falls tenfold at 3/8, 5/8 and 7/8 of the `iterations`.
    Labels: the observation's, else those that the last layer gives away.
    """

    iterations: int = 4800
    learning_rate: float = 0.1
    total_variation: float = 1e-4
    restarts: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or not self.learning_rate > 0 or self.total_variation < 0:
            raise InputError(
                "`iterations` must be at least 1, `learning_rate` positive and `total_variation` not negative, got "
                f"{self.iterations}, {self.learning_rate} and {self.total_variation}."
            )

    def objective(self, own: Tensor, sent: Tensor, inputs: Tensor) -> Tensor:
        """Cosine distance and total variation (Geiping et al. 2020, Eq. 4)."""
        return cosine_distance(own, sent) + self.total_variation * total_variation(inputs)

    def start(self, shape: tuple[int, ...], observation: Observation, generator: torch.Generator | None) -> Tensor:
        """Standard normal in units of a quarter of the value range, around its middle."""
        noise = super().start(shape, observation, generator)
        if observation.value_range is None:
            return noise
        low, high = observation.value_range
        return (low + high) / 2 + (high - low) / 4 * noise

    def minimise(self, function: Callable, start: Tensor, observation: Observation) -> Minima:
        """Adam on signs; each trial keeps its best point."""
        x = start.clone()
        if observation.value_range is not None:
            x.clamp_(*observation.value_range)
        best, best_value = x.clone(), torch.full_like(x[:, 0], float("inf"))
        optimiser = torch.optim.Adam([x], lr=self.learning_rate)
        milestones = [int(self.iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
        for _ in range(self.iterations):
            value, gradient = function(x)
            improved = value < best_value
            best = torch.where(improved[:, None], x, best)
            best_value = torch.where(improved, value, best_value)
            x.grad = gradient.sign()
            optimiser.step()
            schedule.step()
            if observation.value_range is not None:
                x.clamp_(*observation.value_range)
        return Minima(best, best_value, self.iterations, torch.isfinite(best_value))
