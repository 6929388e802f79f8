"""Perturbations in the range of `J^T`: to move the attacker's picture by `d`, send `g + J^T d`.

`(J J^T)^{-1} J` is the pseudo-inverse of `J^T`, so `delta = J^T d` is the shortest perturbation that moves a matching
attacker's reconstruction by `d`; to first order it is the gradient of the pictures `x + d`. All such a defense
chooses is the law of `d`. It costs one forward-over-reverse pass.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.defenses.base import Defense, isotropic, randn, require_positive, scaled_to
from gradguard.defenses.stream import fresh_noise
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, norm
from gradguard.leakage.influence import fits_dense
from gradguard.leakage.spectrum import spectrum
from gradguard.linalg.covariances import PowerLawPrior


@dataclass(frozen=True, kw_only=True)
class DirectionalNoise(Defense):
    """The frame: draw `d`, send `J^T d` scaled to `noise_ratio` times the gradient's norm.

    Every example of the batch gets a `d` of its own; the gradient of the batch carries the sum. A tensor that `J^T`
    does not reach (an auxiliary head that `loss_fn(model(x))` leaves out, a table beside its embeddings, parameters of
    the loss) would leave bare: it gets isotropic noise, `noise_ratio` times its own norm.
    """

    needs_jacobian: ClassVar[bool] = True
    noise_ratio: float = 0.5

    def __post_init__(self) -> None:
        require_positive(noise_ratio=self.noise_ratio)

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """`J^T d`, summed over the batch."""
        assert jacobian is not None  # `Defense.__call__` has refused it
        generator = fresh_noise() if generator is None else generator
        direction = self.displacement(jacobian, generator)
        delta = jacobian.joint().rmatvec(direction)
        sizes = torch.stack([delta[n].abs().sum() if n in delta else g.new_zeros(()) for n, g in gradient.items()])
        reached = {n for n, size in zip(gradient, sizes.tolist(), strict=True) if size != 0}
        covered = {n: g for n, g in gradient.items() if n in reached}
        noise = {}
        if covered:
            noise = scaled_to({n: delta[n].to(g) for n, g in covered.items()}, self.noise_ratio * norm(covered))
        return {
            n: noise[n] if n in reached else isotropic(g, self.noise_ratio, generator, n) for n, g in gradient.items()
        }

    @abstractmethod
    def displacement(self, jacobian: InputJacobian, generator: torch.Generator | None) -> Tensor:
        """`d`: shape of the inputs, up to scale."""


@dataclass(frozen=True, kw_only=True)
class SmallEigenspaceNoise(DirectionalNoise):
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
        if not 0 < self.fraction <= 1:
            raise InputError(f"`fraction` must be in (0, 1], got {self.fraction}.")
        if self.leading < 1:
            raise InputError(f"`leading` must be at least 1, got {self.leading}.")

    def displacement(self, jacobian: InputJacobian, generator: torch.Generator | None) -> Tensor:
        """Gaussian in the small-eigenvalue subspace of each example.

        Args:
            jacobian: Per example.
            generator: Draws the noise.

        Returns:
            `d`, shape of the inputs, up to scale.

        Raises:
            InputError: If the Jacobian is the joint operator of a batch.
        """
        if not jacobian.per_example:
            raise InputError("SmallEigenspaceNoise works per example: pass an `InputJacobian(..., per_example=True)`.")
        eigen = spectrum(jacobian, self.leading, generator=generator)
        noise = randn(jacobian.inputs.shape, jacobian.inputs, generator, "inputs").flatten(1)
        if eigen.complete or fits_dense(jacobian):
            # What the gradient does not show at all cannot be moved: J^T would return its rounding errors.
            singular = eigen.values.sqrt()
            seen = singular > torch.finfo(singular.dtype).eps * jacobian.size * singular[:, :1]
            rank = seen.sum(-1, keepdim=True)
            first = rank - (self.fraction * rank).round().to(rank.dtype).clamp_min(1)
            index = torch.arange(singular.shape[-1], device=rank.device)
            coefficients = noise.gather(1, (index - first).clamp_min(0)) * ((index >= first) & (index < rank))
            noise = torch.einsum("rk,rkn->rn", coefficients, eigen.vectors)
        else:
            noise = noise - torch.einsum("rk,rkn->rn", torch.einsum("rkn,rn->rk", eigen.vectors, noise), eigen.vectors)
        return noise.reshape(jacobian.inputs.shape)


@dataclass(frozen=True, kw_only=True)
class PriorNoise(DirectionalNoise):
    """`d ~ N(0, C)` with `C` a prior of what inputs look like: the reconstruction moves by another picture's worth.

    An attacker cannot tell such an error from a different picture, so no filter takes it out. One pass.

    Args:
        noise_ratio: As in `DirectionalNoise`.
        prior: The covariance `C`.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)

    def displacement(self, jacobian: InputJacobian, generator: torch.Generator | None) -> Tensor:
        """A draw of the prior for each example."""
        return self.prior.sqrt(randn(jacobian.inputs.shape, jacobian.inputs, generator, "inputs"))
