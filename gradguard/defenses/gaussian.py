"""Isotropic Gaussian noise on the gradient: the baseline every defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.defenses.noise import Noise
from gradguard.defenses.recipe import Recipe
from gradguard.defenses.strengths import one_strength


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Recipe):
    """Add `N(0, std^2)` to every element of the gradient. Give one of the two strengths.

    Args:
        noise_ratio: The noise's norm relative to the gradient's, positive: `std = noise_ratio |g| / sqrt(P)`; the ratio
            holds in expectation. It depends on the private gradient's norm: convenient for comparisons, no mechanism
            with a differential-privacy guarantee.
        std: Standard deviation of each element, in gradient units, positive.

    Raises:
        InputError: If not exactly one is given, or it is not positive and finite.
    """

    noise_ratio: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        self.made_of()

    def made_of(self) -> Noise:
        """Independent noise on each element, new for every message."""
        return Noise(strength=one_strength(noise_ratio=self.noise_ratio, std=self.std))
