"""Strengths: how much noise. All say the standard deviation of one element that an attacker faces in one message.

"Faces" is the attacker who knows everything else: with noise that is correlated over rounds that is less than what one
message shows, and it is what a strength means here, so that the same strength protects a message equally under every
schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from gradguard.defenses.laws.base import Shape
from gradguard.defenses.release import Release
from gradguard.errors import InputError


def require_positive(**values: float) -> None:
    """Raises `InputError` for a strength that is not a positive, finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"`{name}` must be positive and finite, got {value}.")


@dataclass(frozen=True, kw_only=True)
class Strength(ABC):
    """Options of a strength. A subclass is a frozen, keyword-only dataclass that defines `std`."""

    @abstractmethod
    def std(self, release: Release, shape: Shape) -> float:
        """The noise's standard deviation on one element, in the mean over elements.

        Args:
            release: the message.
            shape: of the noise there.

        Returns:
            Gradient units, not negative.

        Raises:
            InputError: if the release lacks what the strength goes by.
        """


@dataclass(frozen=True, kw_only=True)
class Std(Strength):
    """A standard deviation.

    Args:
        value: Gradient units, 0 or larger; 0 is no noise.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`Std(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """The value itself."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Ratio(Strength):
    """The noise's norm relative to the message's, in expectation.

    It depends on the private gradient's norm: convenient for comparisons, no mechanism with a guarantee.

    Args:
        value: `|n| / |g|`, 0 or larger.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`Ratio(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """`value |g| / sqrt(P)`."""
        return self.value * release.norm / max(release.size, 1) ** 0.5


@dataclass(frozen=True, kw_only=True)
class NoiseMultiplier(Strength):
    """Noise relative to the sensitivity: what one example can change the message by (clip over batch size).

    Args:
        value: 0 or larger.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`NoiseMultiplier(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """`value` times the release's sensitivity."""
        if release.sensitivity is None:
            raise InputError(
                "A noise multiplier is relative to what one example can change the message by, and nothing bounds that "
                "here. Clip first: `Compose(steps=(ClipPerExample(max_norm=1), Noise(strength=NoiseMultiplier(...))))`."
            )
        return self.value * release.sensitivity
