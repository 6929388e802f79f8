"""The frame every defense fits into: a gradient goes in, what to add to it comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.checks import check_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add, norm


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A perturbation of gradients: strength in the constructor, the gradient at the call.

    A subclass is a frozen, keyword-only dataclass that defines `perturbation`. One that needs to know how the
    gradient depends on the inputs sets `needs_jacobian`. See CONTRIBUTING.md, "A defense".
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
        """`gradient` perturbed: the batch's mean gradient in, what to send out. Neither argument is changed."""
        return add(gradient, self.checked_perturbation(gradient, jacobian, generator=generator))

    def checked_perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`perturbation`, after checking what it is given."""
        check_gradient(gradient, gradient)
        if self.needs_jacobian and jacobian is None:
            raise InputError(
                f"{self.name} depends on how the gradient changes with the inputs: pass "
                "`jacobian=InputJacobian(LossGradient(model, loss_fn), inputs, targets)`."
            )
        return self.perturbation(gradient, jacobian, generator=generator)

    @abstractmethod
    def perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`delta`: what to add to `gradient`, one tensor per parameter."""


def require_positive(**values: float) -> None:
    """Raises `InputError` for a strength that is not a positive, finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"`{name}` must be positive and finite, got {value}.")


def scaled_to(delta: Gradient, length: Tensor) -> Gradient:
    """`delta` scaled to the norm `length` (a scalar tensor); zero stays zero."""
    scale = length / norm(delta).clamp_min(torch.finfo(length.dtype).tiny)
    return {n: d * scale for n, d in delta.items()}


def randn(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers like `like`, drawn on the generator's device (without one: on that of `like`).

    A float64 gradient gets float64 noise, any other float32 noise, several times faster: the same generator gives
    different numbers to the two.
    """
    device = generator.device if generator is not None else like.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).to(like)
