"""The frame of transforms: defenses that make a message of a gradient by a rule that everybody knows.

A quantised gradient is not `g + (q - g)` in floating point, so a transform makes the message itself. What it draws
(which elements go, which way is rounded) is seen in the message or bounded by it: it hides nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.base import Defense
from gradguard.defenses.stream import fresh_noise
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add


@dataclass(frozen=True, kw_only=True)
class Transformation(Defense):
    """A defense that replaces the message. A subclass defines `transformed`, and `knowledge` where it can say more."""

    random: ClassVar[bool] = False

    def __call__(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """The message, as in `Defense.__call__`, without a detour over a difference.

        Args:
            gradient: one tensor per parameter.
            jacobian: of that gradient by the inputs, for a transform that needs it.
            generator: of what is drawn (default: the operating system's entropy).

        Returns:
            What to send, one tensor per parameter.

        Raises:
            InputError: for a gradient that is not finite, or where the Jacobian is missing.
        """
        return self.transformed(gradient, jacobian, self._checked_source(gradient, jacobian, generator))

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """The message less the gradient."""
        source = fresh_noise() if generator is None else generator
        return add(self.transformed(gradient, jacobian, source), gradient, -1.0)

    @abstractmethod
    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """What to send in the place of `gradient`, which is not changed.

        Args:
            gradient: one tensor per parameter, finite.
            jacobian: where the transform needs it.
            generator: of what is drawn.

        Returns:
            The message, the same names, shapes and dtypes.
        """


def check_fraction(fraction: float) -> None:
    """Raises `InputError` for a share outside of (0, 1)."""
    if not 0 < fraction < 1:
        raise InputError(f"`fraction` must be in (0, 1), got {fraction}.")
