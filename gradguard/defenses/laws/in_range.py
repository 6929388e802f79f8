"""Noise in the range of `J^T`: to move the attacker's picture by `d`, send `g + J^T d`.

`(J J^T)^{-1} J` is the pseudo-inverse of `J^T`, so `J^T d` is the shortest perturbation that moves a matching
attacker's reconstruction by `d`; to first order it is the gradient of the pictures `x + d`. All that a law in the range
chooses is the law of `d`. It costs one pass. Noise in the range of one message's `J^T` lies outside that of the next
message's, so it is never correlated over rounds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.defenses.draws import isotropic, randn
from gradguard.defenses.laws.base import Law, Shape
from gradguard.defenses.release import Release
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, norm
from gradguard.leakage.influence import fits_dense
from gradguard.leakage.spectrum import spectrum
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.threats.knowledge import Knowledge, Product


class Displacement:
    """A draw of `d` and its covariance, both up to one common factor.

    Args:
        value: `d`, `(R, *input_shape)`.
        covariance: `u -> K u` on inputs; `None` where it has no short form.
    """

    def __init__(self, value: Tensor, covariance: Product | None) -> None:
        self.value, self.covariance = value, covariance


@dataclass(frozen=True, kw_only=True)
class InRange(Law):
    """The frame: a subclass defines `displacement`, the law of `d`.

    Every example of the batch gets a `d` of its own; the gradient of the batch carries the sum. A tensor that `J^T`
    does not reach (an auxiliary head that `loss_fn(model(x))` leaves out, a table beside its embeddings, parameters of
    the loss) would leave bare: it gets isotropic noise in the proportion of its own norm.
    """

    needs_jacobian: ClassVar[bool] = True

    def prepare(self, release: Release) -> Shape:
        """The Jacobian of the release's batch."""
        return _InRange(self, release)

    def _require_per_example(self, jacobian: InputJacobian) -> None:
        if not jacobian.per_example:
            raise InputError(f"{self.name} works per example: pass an `InputJacobian(..., per_example=True)`.")

    @abstractmethod
    def displacement(self, jacobian: InputJacobian, source: torch.Generator, size: float) -> Displacement:
        """Draw `d`.

        Args:
            jacobian: Of the batch, per example.
            source: Of the noise.
            size: The norm that `J^T d` will be scaled to, gradient units.

        Returns:
            `d` and its covariance, up to scale.
        """


class _InRange(Shape):
    def __init__(self, law: InRange, release: Release) -> None:
        self.law, self.release = law, release
        self.covariance: Product | None = None
        self.bare: dict[str, float] = {}

    def draw(self, source: torch.Generator, std: float) -> Gradient:
        gradient, jacobian = self.release.gradient, self.release.jacobian
        # Of the message: `ratio` times the norm of what `J^T` reaches, and of each tensor that it does not reach.
        ratio = std * self.release.size**0.5 / max(self.release.norm, torch.finfo(torch.float64).tiny)
        found = self.law.displacement(jacobian, source, ratio * self.release.norm)
        delta = jacobian.joint().rmatvec(found.value)
        sizes = torch.stack([delta[n].abs().sum() if n in delta else g.new_zeros(()) for n, g in gradient.items()])
        reached = {n for n, size in zip(gradient, sizes.tolist(), strict=True) if size != 0}
        covered = {n: delta[n].to(g) for n, g in gradient.items() if n in reached}
        if covered:
            length = norm(covered)
            scale = ratio * norm({n: gradient[n] for n in covered}) / length.clamp_min(torch.finfo(length.dtype).tiny)
            covered = {n: d * scale for n, d in covered.items()}
            self.covariance = _scaled(found.covariance, float(scale) ** 2)
        noise = {n: covered[n] if n in reached else isotropic(g, ratio, source, n) for n, g in gradient.items()}
        self.bare = {
            n: ratio**2 * float(g.square().mean()) for n, g in gradient.items() if n not in reached and g.numel()
        }
        return noise

    def knowledge(self, std: float) -> Knowledge:
        return Knowledge(displacement=self.covariance, variance=self.bare or None)


@dataclass(frozen=True, kw_only=True)
class PriorDirections(InRange):
    """`d ~ N(0, C)`, `C` a prior of what inputs look like: the reconstruction moves by another picture's worth.

    Args:
        prior: The covariance `C`: anything with `sqrt(x)`, `(N, *input_shape)`.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)

    def displacement(self, jacobian: InputJacobian, source: torch.Generator, size: float) -> Displacement:
        """A draw of the prior for each example."""
        value = self.prior.sqrt(randn(jacobian.inputs.shape, jacobian.inputs, source, "inputs"))
        return Displacement(value, lambda u: self.prior.sqrt(self.prior.sqrt(u)))


@dataclass(frozen=True, kw_only=True)
class SmallEigenspace(InRange):
    """`d` in the eigenvectors of `J J^T` with the smallest eigenvalues (Zhang et al. 2023, section 5).

    Args:
        fraction: Share of the eigenvectors that carry noise, in (0, 1].
        leading: Directions that are left out of large inputs, at least 1.

    Raises:
        InputError: If a value is outside its range.
    """

    fraction: float = 0.25
    leading: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"`fraction` must be in (0, 1], got {self.fraction}.")
        if self.leading < 1:
            raise InputError(f"`leading` must be at least 1, got {self.leading}.")

    def displacement(self, jacobian: InputJacobian, source: torch.Generator, size: float) -> Displacement:
        """Gaussian in the small-eigenvalue subspace of each example.

        Args:
            jacobian: Per example.
            source: Draws the noise.
            size: Not used: the subspace is the same at every size.

        Returns:
            `d`, and the projection onto its subspace.

        Raises:
            InputError: If the Jacobian is the joint operator of a batch.
        """
        self._require_per_example(jacobian)
        eigen = spectrum(jacobian, self.leading, generator=source)
        if eigen.complete or fits_dense(jacobian):
            # What the gradient does not show at all cannot be moved: J^T would return its rounding errors.
            singular = eigen.values.sqrt()
            seen = singular > torch.finfo(singular.dtype).eps * jacobian.size * singular[:, :1]
            rank = seen.sum(-1, keepdim=True)
            first = rank - (self.fraction * rank).round().to(rank.dtype).clamp_min(1)
            index = torch.arange(singular.shape[-1], device=rank.device)
            inside = (index >= first) & (index < rank)
            noise = randn(jacobian.inputs.shape, jacobian.inputs, source, "inputs").flatten(1)
            coefficients = noise.gather(1, (index - first).clamp_min(0)) * inside
            value = torch.einsum("rk,rkn->rn", coefficients, eigen.vectors)
            kept = eigen.vectors * inside[..., None]
            return _shaped(jacobian, value, lambda u: _projected(u, kept))

        def outside(u: Tensor) -> Tensor:
            return u - _projected(u, eigen.vectors)

        noise = randn(jacobian.inputs.shape, jacobian.inputs, source, "inputs").flatten(1)
        return _shaped(jacobian, outside(noise), outside)


def _shaped(jacobian: InputJacobian, value: Tensor, covariance: Callable[[Tensor], Tensor]) -> Displacement:
    """A displacement and a covariance on flat vectors, in the inputs' shape."""
    shape = jacobian.inputs.shape
    return Displacement(value.reshape(shape), lambda u: covariance(u.flatten(1)).reshape(u.shape))


def _projected(u: Tensor, rows: Tensor) -> Tensor:
    """`u` `(R, n)` projected on orthonormal rows `(R, k, n)`."""
    return torch.einsum("rk,rkn->rn", torch.einsum("rkn,rn->rk", rows, u), rows)


def _scaled(product: Product | None, scale: float) -> Product | None:
    if product is None:
        return None
    return lambda u: scale * product(u)
