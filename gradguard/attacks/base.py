"""What an attack sees, what it returns, and the frame every attack fits into."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradguard.errors import InputError
from gradguard.threats.observation import Observation, Reconstruction


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
