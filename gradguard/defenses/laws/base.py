"""Laws in space: where in the message noise goes, apart from how much of it and how it hangs together over rounds.

A law turns standard normal numbers into noise of a size: `E |n|^2 = P std^2`, `std` in the mean for each element,
whatever the law. Strengths decide `std`, schedules where the numbers come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.release import Release
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge


class Shape(ABC):
    """A law at one release: what it took to prepare (eigenvectors, curvature) is in here."""

    @abstractmethod
    def draw(self, source: torch.Generator, std: float) -> Gradient:
        """Noise, drawn by the tensors' names with `gradguard.defenses.randn`.

        Args:
            source: a message's noise, or a seeded generator.
            std: its root mean square, gradient units, not negative. A law may have another shape at another size.

        Returns:
            One tensor per parameter of the release.
        """

    @abstractmethod
    def knowledge(self, std: float) -> Knowledge:
        """What the receiver knows of noise of size `std` drawn from this shape.

        Args:
            std: positive, gradient units.

        Returns:
            Its covariance, as `variance` or `displacement`.
        """


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """Options of a law. A subclass is a frozen, keyword-only dataclass that defines `prepare`."""

    #: Whether the map is the same in every round, so that noise may be correlated over rounds. Where it is not, the
    #: next message's noise would show this one's outside of its own range.
    fixed: ClassVar[bool] = False
    #: Whether it reaches every element of every message.
    covers: ClassVar[bool] = False
    #: Whether it has to know how the gradient depends on the inputs.
    needs_jacobian: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The law's name in tables."""
        return type(self).__name__

    @abstractmethod
    def prepare(self, release: Release) -> Shape:
        """The law at `release`.

        Args:
            release: the message with what the law needs of its batch.

        Returns:
            Its shape there.

        Raises:
            InputError: if the law cannot work on this release.
        """
