"""Recipes: noise in the range of `J^T`, by the names that people know (see `gradguard.defenses.laws.in_range`)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.defenses.laws.in_range import Displacement, InRange, PriorDirections, SmallEigenspace
from gradguard.defenses.laws.prior_aware import PriorAware
from gradguard.defenses.noise import Noise
from gradguard.defenses.recipe import Recipe
from gradguard.defenses.stream import fresh_noise
from gradguard.defenses.strengths import Ratio, require_positive
from gradguard.functional.jacobian import InputJacobian
from gradguard.linalg.covariances import PowerLawPrior


@dataclass(frozen=True, kw_only=True)
class DirectionalNoise(Recipe):
    """The frame for a law of one's own: draw `d`, send `J^T d` scaled to `noise_ratio` times the gradient's norm.

    Args:
        noise_ratio: The noise's norm relative to the gradient's, positive.
    """

    needs_jacobian: ClassVar[bool] = True
    noise_ratio: float = 0.5

    def __post_init__(self) -> None:
        require_positive(noise_ratio=self.noise_ratio)

    def made_of(self) -> Noise:
        """Noise in the range, relative to the gradient."""
        return Noise(law=self.law(), strength=Ratio(value=self.noise_ratio))

    def law(self) -> InRange:
        """The law of `d`; by default that of `displacement`."""
        return _OwnDisplacement(defense=self)

    @abstractmethod
    def displacement(self, jacobian: InputJacobian, generator: torch.Generator | None) -> Tensor:
        """`d`: shape of the inputs, up to scale."""


@dataclass(frozen=True, kw_only=True)
class _OwnDisplacement(InRange):
    defense: DirectionalNoise

    def displacement(self, jacobian: InputJacobian, source: torch.Generator, size: float) -> Displacement:
        return Displacement(self.defense.displacement(jacobian, source), None)


@dataclass(frozen=True, kw_only=True)
class _NamedLaw(DirectionalNoise):
    """Of a law that has a name: its displacement, the other way round."""

    @abstractmethod
    def law(self) -> InRange:
        """The law of `d`."""

    def displacement(self, jacobian: InputJacobian, generator: torch.Generator | None) -> Tensor:
        """The law's, at the strength that `J^T d` has the norm 1."""
        return self.law().displacement(jacobian, fresh_noise() if generator is None else generator, 1.0).value


@dataclass(frozen=True, kw_only=True)
class SmallEigenspaceNoise(_NamedLaw):
    """Noise along the eigenvectors of `J J^T` with the smallest eigenvalues (Zhang et al. 2023, section 5).

    The most predicted error per unit of `|delta|`. Small inputs: Gaussian in the `fraction` of eigenvectors with the
    smallest eigenvalues, of those that are not zero. Large ones: Gaussian in the complement of the `leading`
    directions that Lanczos finds. Judge it by an attacker who knows pictures: these directions are the ones natural
    pictures have little energy in, so a Wiener filter takes much of the noise out again.

    Args:
        noise_ratio: As in `DirectionalNoise`.
        fraction: Share of the eigenvectors that carry noise, in (0, 1].
        leading: Directions that are left out of large inputs, at least 1.

    Raises:
        InputError: If a value is outside its range.
    """

    fraction: float = 0.25
    leading: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.law()

    def law(self) -> SmallEigenspace:
        """The subspace."""
        return SmallEigenspace(fraction=self.fraction, leading=self.leading)


@dataclass(frozen=True, kw_only=True)
class PriorNoise(_NamedLaw):
    """`d ~ N(0, C)` with `C` a prior of what inputs look like: the reconstruction moves by another picture's worth.

    An attacker cannot tell such an error from a different picture, so no filter takes it out. One pass.

    Args:
        noise_ratio: As in `DirectionalNoise`.
        prior: The covariance `C`.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)

    def law(self) -> PriorDirections:
        """The prior's."""
        return PriorDirections(prior=self.prior)


@dataclass(frozen=True, kw_only=True)
class PriorAwareNoise(_NamedLaw):
    """Noise where inputs have energy and the gradient shows little of them (see `laws.PriorAware`).

    Of all noise in the range of `J^T` of the same norm it leaves an attacker who knows the prior and the defense the
    highest mean squared error where prior and `J J^T` commute, and close to it elsewhere.

    Args:
        noise_ratio: As in `DirectionalNoise`.
        prior: The covariance `C`.
        steps: Lanczos steps for inputs too large for a dense Jacobian, at least 1.

    Raises:
        InputError: If a value is outside its range.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.law()

    def law(self) -> PriorAware:
        """Reverse water-filling."""
        return PriorAware(prior=self.prior, steps=self.steps)
