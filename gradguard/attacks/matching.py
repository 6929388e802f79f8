"""Gradient matching: look for inputs whose gradient is the one that was sent.

One engine for DLG and its descendants. All restarts are a batch dimension: `T` trials advance together, each with
its own state, and the one with the lowest matching loss is kept. The truth is never looked at.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from gradguard.attacks.base import Attack, Observation, Reconstruction
from gradguard.attacks.labels import infer_labels
from gradguard.attacks.lbfgs import Minima
from gradguard.attacks.levenberg_marquardt import levenberg_marquardt
from gradguard.errors import InputError
from gradguard.gradients import flatten

#: `(candidate gradient (P,), sent gradient (P,)) -> scalar`, zero where they agree.
Distance = Callable[[Tensor, Tensor], Tensor]


def squared_distance(own: Tensor, sent: Tensor) -> Tensor:
    """`|own - sent|^2 / |sent|^2`: DLG's, in units that do not depend on the gradient's size."""
    return ((own - sent) ** 2).sum() / (sent**2).sum()


def cosine_distance(own: Tensor, sent: Tensor) -> Tensor:
    """`1 - <own, sent> / (|own| |sent|)` (Geiping et al. 2020, Eq. 4)."""
    tiny = torch.finfo(own.dtype).tiny
    return 1 - (own @ sent) / ((own @ own).clamp_min(tiny).sqrt() * (sent @ sent).clamp_min(tiny).sqrt())


def total_variation(inputs: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, for `(..., height, width)`."""
    if inputs.ndim < 3:
        return inputs.new_zeros(())
    return (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean() + (inputs[..., 1:] - inputs[..., :-1]).abs().mean()


@dataclass(frozen=True, kw_only=True)
class MatchingAttack(Attack):
    """The frame: start `restarts` trials, minimise the matching objective, polish, keep the best.

    `restarts`: trials, all advanced together. `polish`: Levenberg-Marquardt iterations on every trial afterwards;
    on smooth networks they take a found picture to the precision of the arithmetic. `dtype`: what it computes in.
    A subclass says what it minimises (`objective`) and how (`minimise`), and where trials start (`start`).
    """

    restarts: int = 4
    polish: int = 0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InputError(f"`restarts` must be at least 1, got {self.restarts}.")
        if self.polish < 0:
            raise InputError(f"`polish` must not be negative, got {self.polish}.")

    @abstractmethod
    def objective(self, own: Tensor, sent: Tensor, inputs: Tensor) -> Tensor:
        """What is minimised, for one trial: gradients `(P,)` and inputs `(B, *input_shape)` to a scalar."""

    @abstractmethod
    def minimise(self, function: Callable, start: Tensor, observation: Observation) -> Minima:
        """Minimise `function`, `(T, n) -> values (T,), gradients (T, n)`, from `start` `(T, n)`."""

    def start(self, shape: tuple[int, ...], observation: Observation, generator: torch.Generator | None) -> Tensor:
        """The trials' first inputs: standard normal."""
        device = generator.device if generator is not None else torch.device("cpu")
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        return noise.to(observation.loss_gradient.device, self.dtype)

    def labels_for(self, observation: Observation) -> Tensor:
        """The labels that the trials are held to: the given ones, or those that the last layer gives away."""
        return observation.labels if observation.labels is not None else infer_labels(observation)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """All trials together; the best by matching loss."""
        observation = observation.in_dtype(self.dtype)
        labels = observation.loss_gradient.cast(self.labels_for(observation))
        shape = (self.restarts, observation.batch_size, *observation.input_shape)
        targets = labels.expand(self.restarts, *labels.shape)
        found = self.minimise(
            self.matching_function(observation, targets),
            self.start(shape, observation, generator).flatten(1),
            observation,
        )
        return self.finish(observation, found.points.reshape(shape), targets, found.evaluations)

    def finish(self, observation: Observation, inputs: Tensor, targets: Tensor, evaluations: int) -> Reconstruction:
        """Polish the trials and keep the one with the lowest matching loss."""
        details: dict[str, Any] = {"evaluations": evaluations}
        losses = matching_losses(observation, inputs, targets)
        if self.polish:
            polished = levenberg_marquardt(observation, inputs, targets, iterations=self.polish)
            refined = polished.points.reshape(inputs.shape)
            better = polished.values < losses
            inputs = torch.where(better.reshape(-1, *[1] * (inputs.ndim - 1)), refined, inputs)
            losses = torch.where(better, polished.values, losses)
            details["polish_iterations"] = polished.evaluations
        losses = torch.nan_to_num(losses, nan=float("inf"))
        best = int(losses.argmin())
        details |= {"trial": best, "trial_losses": losses.tolist()}
        return Reconstruction(
            attack=self.name,
            inputs=inputs[best].detach(),
            labels=targets[best].detach(),
            converged=bool(torch.isfinite(losses[best])) and self.has_converged(float(losses[best])),
            details=details,
        )

    def has_converged(self, loss: float) -> bool:
        """Whether a relative squared matching loss counts as a match; noise on the gradient makes that impossible."""
        return loss < 1e-6

    def matching_function(self, observation: Observation, targets: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The objective and its derivative by the inputs, for all trials: `(T, n) -> (T,), (T, n)`."""
        function = observation.loss_gradient
        parameters, sent = function.parameters(), flatten(observation.sent)
        shape = (observation.batch_size, *observation.input_shape)

        def one(x: Tensor, y: Tensor) -> Tensor:
            inputs = x.reshape(shape)
            return self.objective(flatten(grad(function.loss)(parameters, inputs, y)), sent, inputs)

        batched = vmap(grad_and_value(one))

        def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = batched(x, targets)
            return value.detach(), gradient.detach()

        return value_and_gradient


def matching_losses(observation: Observation, inputs: Tensor, targets: Tensor) -> Tensor:
    """The relative squared matching loss of each trial: `(T,)` for `inputs` `(T, B, *input_shape)`."""
    function = observation.loss_gradient
    parameters, sent = function.parameters(), flatten(observation.sent)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return squared_distance(flatten(grad(function.loss)(parameters, x, y)), sent)

    return vmap(one)(inputs, targets)
