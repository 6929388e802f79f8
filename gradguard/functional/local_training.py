"""What a client of federated averaging sends: the change of its parameters over several local steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient, add

Loss = Callable[[Gradient, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """`steps` of plain SGD on a client's own examples (FedAvg, McMahan et al. 2017).

    `batch_size`: examples per step, taken in order and from the start again at the end; `None`: all, in every step.

    Instead of the update itself its mean gradient is used, `(before - after) / (learning_rate * steps)`: for one step
    it is the gradient.
    """

    steps: int
    learning_rate: float
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"`steps` must be at least 1, got {self.steps}.")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"`learning_rate` must be positive and finite, got {self.learning_rate}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {self.batch_size}.")

    def mean_gradient(self, loss_gradient: LossGradient, inputs: Tensor, targets: Tensor) -> Gradient:
        """What training on `inputs` `(B, *input_shape)` and `targets` from the model's parameters sends."""
        loss_gradient.check_batch(inputs, targets)
        x, y = loss_gradient.cast(inputs), loss_gradient.cast(targets)
        return self(loss_gradient.loss, loss_gradient.parameters(), x, y)

    def of_update(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Gradient:
        """The mean gradient behind an update, from the parameters before and after it."""
        return {n: (b - after[n]) / (self.learning_rate * self.steps) for n, b in before.items()}

    def __call__(self, loss: Loss, parameters: Gradient, inputs: Tensor, targets: Tensor) -> Gradient:
        """The same as a pure function of `parameters`, `inputs` and `targets`, differentiable by all three."""
        size = len(inputs) if self.batch_size is None else min(self.batch_size, len(inputs))
        parts = list(zip(inputs.split(size), targets.split(size), strict=True))
        after = parameters
        for step in range(self.steps):
            x, y = parts[step % len(parts)]
            after = add(after, grad(loss)(after, x, y), -self.learning_rate)
        return self.of_update(parameters, after)


def surrogate_model(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, share: float = 0.5
) -> nn.Module:
    """A copy of `model` with the parameters `(1 - share) before + share after`.

    For updates of many steps, through which differentiating is too long: the mean gradient along the way
    (`LocalTraining.of_update`) is close to the gradient at a point between the two ends, so a single-step attack on
    this model does better than one on either end (Zhu et al. 2023, "Surrogate model extension", ICML, section 4). Which
    `share` explains the update best is found by `attacks.attack_candidates`.
    """
    if not 0 <= share <= 1:
        raise InputError(f"`share` must be in [0, 1], got {share}.")
    between = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in between.named_parameters():
            if name in before:
                parameter.copy_(torch.lerp(before[name].to(parameter), after[name].to(parameter), share))
    return between
