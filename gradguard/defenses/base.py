"""The frame every defense fits into: a gradient goes in, what to add to it comes out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.defenses.stream import SEEDED, MessageNoise, fresh_noise
from gradguard.errors import InputError, SeededNoiseWarning
from gradguard.functional.checks import check_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add, norm


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A perturbation of gradients: strength in the constructor, the gradient at the call.

    A subclass is a frozen, keyword-only dataclass that defines `perturbation`. One that needs to know how the
    gradient depends on the inputs sets `needs_jacobian`; one that draws nothing at random sets `random` to `False`. See
    CONTRIBUTING.md, "A defense".
    """

    needs_jacobian: ClassVar[bool] = False
    #: Whether it draws secret noise. What does not (pruning) hides nothing from an attacker who knows it.
    random: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The defense's name in tables."""
        return type(self).__name__

    def __call__(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`gradient` perturbed: the batch's mean gradient in, what to send out. Neither argument is changed.

        Args:
            gradient: one tensor per parameter.
            jacobian: of that gradient by the inputs, for a defense that needs it.
            generator: of the noise. Default: a new key from the operating system, so that nobody can draw the noise
                again. `NoiseStream.message()` gives the noise of a message in a stream. A seeded generator makes the
                noise reproducible, for tests, and warns (`SeededNoiseWarning`).

        Returns:
            What to send, one tensor per parameter.

        Raises:
            InputError: for a gradient that is not finite, or where the Jacobian is missing.
        """
        if self.random and generator is not None and not isinstance(generator, MessageNoise):
            warnings.warn(f"{self.name}: {SEEDED}", SeededNoiseWarning, stacklevel=2)
        return add(gradient, self.checked_perturbation(gradient, jacobian, generator=generator))

    def checked_perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`perturbation`, after checking what it is given.

        Args:
            gradient: One tensor per parameter.
            jacobian: Of that gradient by the inputs, for a defense that needs it.
            generator: Of the noise. Default: a new key from the operating system, so that the noise is secret.

        Returns:
            What to add to `gradient`, one tensor per parameter.

        Raises:
            InputError: The gradient is not finite, or the Jacobian is missing.
        """
        check_gradient(gradient, gradient)
        if self.needs_jacobian and jacobian is None:
            raise InputError(
                f"{self.name} depends on how the gradient changes with the inputs: pass "
                "`jacobian=InputJacobian(LossGradient(model, loss_fn), inputs, targets)`."
            )
        if generator is None:
            # Also for a subclass that hands `generator` to PyTorch, where `None` means the global generator.
            generator = fresh_noise(next((g.device for g in gradient.values()), "cpu"))
        return self.perturbation(gradient, jacobian, generator=generator)

    @abstractmethod
    def perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`delta`, what to add to `gradient`.

        Args:
            gradient: One tensor per parameter.
            jacobian: Of that gradient by the inputs, for a defense that needs it.
            generator: Of the noise.

        Returns:
            One tensor per parameter, in the parameter's shape.
        """


def require_positive(**values: float) -> None:
    """Raises `InputError` for a strength that is not a positive, finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"`{name}` must be positive and finite, got {value}.")


def scaled_to(delta: Gradient, length: Tensor) -> Gradient:
    """`delta` scaled to a norm; zero stays zero.

    Args:
        delta: One tensor per parameter.
        length: The norm over all of them, a scalar tensor.

    Returns:
        One tensor per parameter.
    """
    scale = length / norm(delta).clamp_min(torch.finfo(length.dtype).tiny)
    return {n: d * scale for n, d in delta.items()}


def isotropic(gradient: Tensor, noise_ratio: float, generator: torch.Generator | None, name: str) -> Tensor:
    """Independent Gaussian noise on one tensor.

    Args:
        gradient: Of any shape.
        noise_ratio: The noise's length relative to the tensor's, in expectation of the square.
        generator: Of the noise.
        name: Of the tensor, see `randn`.

    Returns:
        The noise alone, in the tensor's shape.
    """
    std = noise_ratio * torch.linalg.vector_norm(gradient) / max(gradient.numel(), 1) ** 0.5
    return std * randn(gradient.shape, gradient, generator, name)


def randn(
    shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None, name: str = ""
) -> Tensor:
    """Standard normal numbers like `like`.

    Without a generator they come from a new key; from a message's noise by the `name` of the tensor that they are for
    (see `gradguard.defenses.stream`). A seeded generator draws on its own device; a float64 gradient then gets float64
    noise, any other float32 noise, several times faster: the same generator gives different numbers to the two.

    Args:
        shape: of the noise.
        like: whose dtype and device the noise takes.
        generator: where it comes from.
        name: the address within a message; what is drawn again under one name are other numbers.

    Returns:
        Noise of shape `shape`.
    """
    if generator is None:
        generator = fresh_noise()
    if isinstance(generator, MessageNoise):
        return generator.normal(name, shape).to(like)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to(like)
