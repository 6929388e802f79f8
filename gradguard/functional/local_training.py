"""What a client of federated averaging sends: the change of its parameters over several local steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.structures import Rest, rows_of
from gradguard.functional.vectors import Gradient, add
from gradguard.functional.whole_batch import take

Loss = Callable[[Gradient, Tensor, Rest], Tensor]
Regulariser = Callable[[Gradient], Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """`steps` of SGD on a client's own examples (FedAvg, McMahan et al. 2017), as `torch.optim.SGD` takes them.

    Instead of the update itself its mean gradient is used, `(before - after) / (learning_rate * steps)`: for one step
    it is the gradient (and that of the regulariser).

    Args:
        steps: At least 1.
        learning_rate: Positive and finite.
        batch_size: Examples per step, at least 1, taken in order and from the start again at the end. `None`: all, in
            every step.
        optimiser: "sgd".
        momentum: Of `torch.optim.SGD`, not negative (no dampening, no Nesterov).
        weight_decay: Of `torch.optim.SGD`, not negative.
        regulariser: What the client adds to its loss in every step, a pure function of the trainable parameters (a
            dictionary keyed as `named_parameters()`) that returns a scalar. FedProx (Li et al. 2020) adds
            `mu / 2 * sum(((p[n] - start[n]) ** 2).sum() for n in p)`.

    Raises:
        InputError: A value is outside its range.
    """

    steps: int
    learning_rate: float
    batch_size: int | None = None
    optimiser: Literal["sgd"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    regulariser: Regulariser | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"`steps` must be at least 1, got {self.steps}.")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"`learning_rate` must be positive and finite, got {self.learning_rate}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.optimiser != "sgd":
            raise InputError(
                f'`optimiser` must be "sgd", got {self.optimiser!r}: an update of another one is no sum of gradients, '
                "and its receiver cannot be judged as one who knows it."
            )
        for name, value in (("momentum", self.momentum), ("weight_decay", self.weight_decay)):
            if not 0 <= value < float("inf"):
                raise InputError(f"`{name}` must not be negative, got {value}.")
        if self.regulariser is not None and not callable(self.regulariser):
            raise InputError("`regulariser` must be a function of the parameters that returns a scalar.")

    def mean_gradient(self, loss_gradient: LossGradient, inputs: Any, targets: Any) -> Gradient:
        """What training from the model's parameters sends.

        Args:
            loss_gradient: The model and the loss.
            inputs: `(B, *input_shape)`, or a structure.
            targets: `(B, ...)`.

        Returns:
            The mean gradient, one tensor per trainable parameter.

        Raises:
            InputError: What `LossGradient.check_batch` raises, and for a regulariser that returns no finite scalar.
        """
        loss_gradient, inputs, targets = take(loss_gradient, inputs, targets)
        loss_gradient.check_batch(inputs, targets)
        parameters = loss_gradient.parameters()
        self._check_regulariser(parameters)
        x, y = loss_gradient.cast(inputs), loss_gradient.cast(targets)
        return self(loss_gradient.loss, parameters, x, y)

    def of_update(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Gradient:
        """The mean gradient behind an update.

        Args:
            before: The parameters before it.
            after: The parameters after it.

        Returns:
            `(before - after) / (learning_rate * steps)`, name by name.
        """
        return {n: (b - after[n]) / (self.learning_rate * self.steps) for n, b in before.items()}

    def __call__(self, loss: Loss, parameters: Gradient, inputs: Tensor, targets: Rest) -> Gradient:
        """The mean gradient as a pure function of `parameters`, `inputs` and `targets`, differentiable by all three.

        Args:
            loss: `(parameters, inputs, targets) -> scalar`.
            parameters: One tensor per trainable parameter, before the first step.
            inputs: `(B, *input_shape)`.
            targets: `(B, ...)`.

        Returns:
            One tensor per trainable parameter.
        """
        size = len(inputs) if self.batch_size is None else min(self.batch_size, len(inputs))
        rows = [slice(first, first + size) for first in range(0, len(inputs), size)]
        parts = [(inputs[own], rows_of(targets, own)) for own in rows]

        def objective(now: Gradient, x: Tensor, y: Rest) -> Tensor:
            value = loss(now, x, y)
            return value if self.regulariser is None else value + self.regulariser(now)

        after, velocity = parameters, None
        for step in range(self.steps):
            slope = grad(objective)(after, *parts[step % len(parts)])
            if self.weight_decay:
                slope = add(slope, after, self.weight_decay)
            # `torch.optim.SGD` begins with the gradient itself, and does not dampen it later.
            velocity = slope if velocity is None or not self.momentum else add(slope, velocity, self.momentum)
            after = add(after, velocity, -self.learning_rate)
        return self.of_update(parameters, after)

    def examples_used(self, count: int) -> int:
        """How many of the first of `count` examples the steps take at all."""
        return count if self.batch_size is None else min(count, self.steps * self.batch_size)

    def amplification(self, count: int) -> float:
        """How much of an example's own gradient the mean gradient holds, at most.

        Momentum repeats what it has seen, and an example that is in more steps than others weighs more.

        Args:
            count: How many examples are trained on, at least 1.

        Returns:
            The largest weight of an example, in units of its share in the gradient of all, to first order in the
                learning rate.
        """
        repeats = sum(sum(self.momentum**j for j in range(self.steps - k)) for k in range(self.steps)) / self.steps
        if self.batch_size is None or self.batch_size >= count:
            return repeats
        parts = -(-count // self.batch_size)
        # An example's weight is 1/size in each step that it is in; the last part may be smaller than the others.
        sizes = [min(self.batch_size, count - part * self.batch_size) for part in range(parts)]
        visits = [len(range(part, self.steps, parts)) for part in range(parts)]
        return repeats * max(count * v / (s * self.steps) for v, s in zip(visits, sizes, strict=True))

    def _check_regulariser(self, parameters: Gradient) -> None:
        if self.regulariser is None:
            return
        value = self.regulariser(parameters)
        if not isinstance(value, Tensor) or value.ndim or not torch.isfinite(value):
            raise InputError(
                "`regulariser` must return a finite scalar tensor, got "
                f"{value if not isinstance(value, Tensor) or not value.ndim else tuple(value.shape)}."
            )


def surrogate_model(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, share: float = 0.5
) -> nn.Module:
    """A copy of `model` with the parameters `(1 - share) before + share after`.

    It is for updates of many steps, through which differentiating is too long. The mean gradient along the way
    (`LocalTraining.of_update`) is close to the gradient at a point between the two ends, so a single-step attack on
    this model does better than one on either end (Zhu et al. 2023, "Surrogate model extension", ICML, section 4). Which
    `share` explains the update best is found by `attacks.attack_candidates`.

    Args:
        model: It stays as it is.
        before: Parameters before the update; those that it does not name stay the model's.
        after: Parameters after it.
        share: In [0, 1].

    Returns:
        The copy.

    Raises:
        InputError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"`share` must be in [0, 1], got {share}.")
    between = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in between.named_parameters():
            if name in before:
                parameter.copy_(torch.lerp(before[name].to(parameter), after[name].to(parameter), share))
    return between
