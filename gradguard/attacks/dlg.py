"""Deep leakage from gradients, and iDLG's shortcut to the label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from gradguard.attacks.base import Observation, Reconstruction
from gradguard.attacks.lbfgs import Minima, lbfgs
from gradguard.attacks.matching import MatchingAttack, squared_distance
from gradguard.errors import InputError
from gradguard.gradients import flatten


@dataclass(frozen=True, kw_only=True)
class DLG(MatchingAttack):
    """Zhu, Liu & Han 2019, "Deep leakage from gradients": match the gradient in squared distance by L-BFGS.

    Labels: those of the observation; where it has none, `labels` says what to do: "joint" optimises class
    probabilities beside the inputs, as the paper does (the loss must take probabilities, as cross-entropy does),
    "inferred" takes them from the last layer first (iDLG for one example, iLRG for more).
    `evaluations`: gradient evaluations of all trials. Differs from the paper in: a Wolfe line search, `restarts`
    trials side by side, float64, and a second-order polish (`polish=0` leaves it out).
    """

    evaluations: int = 300
    memory: int = 20
    polish: int = 50
    labels: Literal["joint", "inferred"] = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in ("joint", "inferred"):
            raise InputError(f'`labels` must be "joint" or "inferred", got {self.labels!r}.')
        if self.evaluations < 1:
            raise InputError(f"`evaluations` must be at least 1, got {self.evaluations}.")

    def check(self, observation: Observation) -> None:
        """Joint labels need a number of classes."""
        if observation.labels is None and self.labels == "joint" and observation.num_classes is None:
            raise InputError(
                "DLG with unknown labels optimises class probabilities and needs `num_classes` in the observation; "
                "give it, or the labels themselves."
            )

    def objective(self, own: Tensor, sent: Tensor, inputs: Tensor) -> Tensor:
        """The squared distance, relative to the sent gradient."""
        return squared_distance(own, sent)

    def minimise(self, function: Callable, start: Tensor, observation: Observation) -> Minima:
        """L-BFGS; as soon as one trial matches, the others have lost."""
        # The polish takes over where L-BFGS has found the basin.
        target = 1e-10 if self.polish else 1e-24
        return lbfgs(
            function, start, evaluations=self.evaluations, memory=self.memory, target=target, stop_at_first=True
        )

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """Known or inferred labels: the engine's. Joint: inputs and label logits are one vector."""
        if observation.labels is not None or self.labels == "inferred":
            return super().run(observation, generator)
        observation = observation.in_dtype(self.dtype)
        trials, batch, classes = self.restarts, observation.batch_size, observation.num_classes or 0
        shape = (trials, batch, *observation.input_shape)
        inputs = self.start(shape, observation, generator).flatten(1)
        logits = self.start((trials, batch, classes), observation, generator).flatten(1)
        width = inputs.shape[1]
        function = observation.loss_gradient
        parameters, sent = function.parameters(), flatten(observation.sent)

        def one(variables: Tensor) -> Tensor:
            x = variables[:width].reshape(batch, *observation.input_shape)
            probabilities = variables[width:].reshape(batch, classes).softmax(-1)
            return squared_distance(flatten(grad(function.loss)(parameters, x, probabilities)), sent)

        batched = vmap(grad_and_value(one))

        def value_and_gradient(variables: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = batched(variables)
            return value.detach(), gradient.detach()

        found = self.minimise(value_and_gradient, torch.cat([inputs, logits], dim=1), observation)
        points, logits = found.points.split([width, batch * classes], dim=1)
        labels = logits.reshape(trials, batch, classes).argmax(-1)
        return self.finish(observation, points.reshape(shape), labels, found.evaluations)


@dataclass(frozen=True, kw_only=True)
class IDLG(DLG):
    """Zhao, Mopuri & Bilen 2020, "iDLG": the label from the last layer's signs, then DLG on the inputs alone."""

    labels: Literal["joint", "inferred"] = "inferred"
