"""What an attack sees, what it returns, and the frame every attack fits into."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad

from gradguard.errors import InputError
from gradguard.gradients import Gradient, LossGradient, add, norm
from gradguard.local_training import LocalTraining


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


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack: hyperparameters in the constructor, the observation at the call.

    A subclass is a frozen, keyword-only dataclass that defines `run` and, if it cannot work on every observation,
    `check`. See CONTRIBUTING.md, "An attack".
    """

    recovers_inputs: ClassVar[bool] = True
    #: Whether it can attack what a client sends after several local steps.
    takes_local_training: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return type(self).__name__

    def __call__(self, observation: Observation, *, generator: torch.Generator | None = None) -> Reconstruction:
        """Attack. `generator`: all of the attack's randomness; the same generator state gives the same result.

        Raises `InputError` or `UnsupportedModelError` before any long work if the attack cannot work here.
        """
        self.check_all(observation)
        start = time.perf_counter()
        result = self.run(observation, generator)
        return self.finished(observation, result, time.perf_counter() - start)

    def finished(self, observation: Observation, result: Reconstruction, seconds: float) -> Reconstruction:
        """`result` with what every attack's has: its name, its matching loss, its time."""
        matching_loss = result.matching_loss
        if result.inputs is not None and result.labels is not None:
            # In float64 on the CPU: attacks of different precision are compared by it.
            matching_loss = observation.in_dtype(torch.float64).matching_loss(result.inputs, result.labels)
        return replace(result, attack=self.name, matching_loss=matching_loss, seconds=seconds)

    def check_all(self, observation: Observation) -> None:
        """`check`, after what holds for every attack."""
        if observation.local is not None and not self.takes_local_training:
            raise InputError(
                f"{self.name} attacks a single gradient, and this client took {observation.local.steps} local steps. "
                "Use a gradient-matching attack, which differentiates through the steps."
            )
        self.check(observation)

    def check(self, observation: Observation) -> None:
        """Raise for an observation that this attack cannot work on. Cheap; called before `run`."""

    @abstractmethod
    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack itself."""


def attack_candidates(
    attack: Attack, candidates: Sequence[Observation], *, generator: torch.Generator | None = None
) -> tuple[Reconstruction, int]:
    """Attack one sent gradient under several guesses at what is not known; the guess that explains it best, and which.

    `candidates`: observations that differ in what the attacker guesses: a client's learning rate, its steps or the size
    of its batches (`local`), the labels. The matching loss is relative to the sent gradient, so they can be compared.
    Raises `InputError` if there is none.
    """
    if not candidates:
        raise InputError("There is no candidate to attack: give an observation for each guess.")
    results = [attack(observation, generator=generator) for observation in candidates]
    best = min(range(len(results)), key=lambda i: (math.isnan(results[i].matching_loss), results[i].matching_loss))
    return results[best], best
