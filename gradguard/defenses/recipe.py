"""Recipes: combinations of law, schedule, strength and clipping under the names that people know."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from gradguard.defenses.base import Defense
from gradguard.defenses.protector import Protector
from gradguard.defenses.release import Release
from gradguard.defenses.stream import NoiseStream
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Recipe(Defense):
    """A name for a defense made of others. A subclass is a frozen, keyword-only dataclass that defines `made_of`."""

    @abstractmethod
    def made_of(self) -> Defense:
        """What does the work."""

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """That of what it is made of."""
        return self.made_of().perturbation(gradient, jacobian, generator=generator)

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """That of what it is made of."""
        return self.made_of().knowledge(release, message)

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> Protector:
        return self.made_of()._protector(stream, generator)
