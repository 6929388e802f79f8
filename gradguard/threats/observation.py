"""What an attack sees, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from gradguard.errors import InputError
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient, add, norm


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything the threat model grants an attacker, and nothing of the truth.

    `loss_gradient`: the model and the loss, as the server has them.
    `sent`: the gradient that was sent, one tensor per parameter: the batch's mean gradient, perturbed or not.
    `input_shape`: the shape of one example. `batch_size`: `B`.
    `labels`: int64 `(B,)` or, for a binary loss, float `(B, 1)`; `None` if the attacker does not have them.
    `num_classes`: `C`; `None` where the loss has no classes.
    `value_range`: the range of valid inputs, which boxed attacks use; `None` if unknown.
    `local`: how the client trained, if it took several steps; `sent` is then their mean gradient (see
        `LocalTraining`), and gradient-matching attacks differentiate through the steps. Other attacks refuse.
    """

    loss_gradient: LossGradient
    sent: Gradient
    input_shape: tuple[int, ...]
    batch_size: int = 1
    labels: Tensor | None = None
    num_classes: int | None = None
    value_range: tuple[float, float] | None = (0.0, 1.0)
    local: LocalTraining | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.labels is not None and len(self.labels) != self.batch_size:
            raise InputError(
                f"`labels` must have one entry per example: {self.batch_size} examples, {len(self.labels)} labels."
            )
        self.loss_gradient.check_model()
        self.loss_gradient.check_gradient(self.sent)

    def in_dtype(self, dtype: torch.dtype) -> Observation:
        """The same observation with model and gradient computed in `dtype`."""
        return replace(
            self,
            loss_gradient=self.loss_gradient.with_dtype(dtype),
            sent={n: g.to(dtype) for n, g in self.sent.items()},
        )

    def gradient(self, parameters: Gradient, inputs: Tensor, targets: Tensor) -> Gradient:
        """What the client would have sent for other data, as a pure function: what matching attacks compare."""
        loss = self.loss_gradient.loss
        if self.local is not None:
            return self.local(loss, parameters, inputs, targets)
        return grad(loss)(parameters, inputs, targets)

    def matching_loss(self, inputs: Tensor, labels: Tensor) -> float:
        """`|g(inputs) - sent|^2 / |sent|^2`: what every attack's candidates are compared by."""
        function = self.loss_gradient
        own = self.gradient(function.parameters(), function.cast(inputs), function.cast(labels))
        sent = {n: g.to(own[n].dtype) for n, g in self.sent.items()}
        return ((norm(add(own, sent, -1.0)) / norm(sent)) ** 2).item()


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an attack came back with.

    `attack`: its name. `inputs`: `(B, *input_shape)`, or `None` for an attack on labels only. `labels`: as in
    `Observation`, given or recovered. `label_counts`: `(C,)` int64, for attacks that count labels.
    `matching_loss`: relative squared distance between the candidate's gradient and the sent one (`nan` without
    inputs). `converged`: by the attack's own criterion. `seconds`: wall clock. `details`: what the attack has to
    say beside (iterations, residuals, which trial won), plain numbers and strings.

    Inputs are private data: they are in no `repr` and are written nowhere unless asked for.
    """

    attack: str
    inputs: Tensor | None = field(default=None, repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    label_counts: Tensor | None = field(default=None, repr=False)
    matching_loss: float = float("nan")
    converged: bool = False
    seconds: float = float("nan")
    details: dict[str, Any] = field(default_factory=dict)
