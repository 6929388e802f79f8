"""The same independent noise on every element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.draws import randn
from gradguard.defenses.laws.base import Law, Shape
from gradguard.defenses.release import Release
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Isotropic(Law):
    """`N(0, I)` on the elements of the message: after clipping the only law here with an (epsilon, delta)."""

    fixed: ClassVar[bool] = True
    covers: ClassVar[bool] = True

    def prepare(self, release: Release) -> Shape:
        """Nothing to prepare."""
        return _Isotropic(release.gradient)


class _Isotropic(Shape):
    def __init__(self, like: Gradient) -> None:
        self.like = like

    def draw(self, source: torch.Generator, std: float) -> Gradient:
        return {n: std * randn(g.shape, g, source, n) for n, g in self.like.items()}

    def knowledge(self, std: float) -> Knowledge:
        return Knowledge(variance=std**2)
