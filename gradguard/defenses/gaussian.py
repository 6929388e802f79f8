"""Isotropic Gaussian noise on the gradient: the baseline every defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradguard.defenses.base import Defense, randn, require_positive
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, norm


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defense):
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
        if (self.noise_ratio is None) == (self.std is None):
            raise InputError(f"Give exactly one of `noise_ratio` and `std`, got {self.noise_ratio} and {self.std}.")
        require_positive(**({"std": self.std} if self.std is not None else {"noise_ratio": self.noise_ratio or 0.0}))

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """Independent Gaussian noise per element."""
        if self.noise_ratio is None:
            std: float | Tensor = self.std or 0.0
        else:
            std = self.noise_ratio * norm(gradient) / sum(g.numel() for g in gradient.values()) ** 0.5
        return {n: std * randn(g.shape, g, generator, n) for n, g in gradient.items()}
