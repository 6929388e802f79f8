"""Rounding: signs and a few levels. What is sent bounds each element of the gradient.

The transforms here know the set of gradients that give a message (`nearest`): an attacker who looks for inputs whose
gradient lies in it has a smooth objective where the step's own derivative is zero almost everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradguard.defenses.draws import randn
from gradguard.defenses.release import Release
from gradguard.defenses.transforms.base import Transformation
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Sign(Transformation):
    """Send the sign of each element (signSGD; Bernstein et al. 2018, arXiv 1802.04434).

    Args:
        scaled: Times the tensor's mean magnitude, so that the message has about the gradient's size (Karimireddy et al.
            2019). The magnitude is one more number that the receiver learns.
    """

    scaled: bool = False

    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """The signs; 0 for 0."""
        return SignStep(scaled=self.scaled)(gradient)

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """That signs were taken."""
        return Knowledge(transforms=(SignStep(scaled=self.scaled),))


@dataclass(frozen=True, kw_only=True)
class SignStep:
    """`g -> sign(g)` as an attacker uses it. `scaled`: as in `Sign`."""

    name: ClassVar[str] = "sign"
    straight_through: ClassVar[bool] = True
    scaled: bool = False

    def __call__(self, gradient: Gradient) -> Gradient:
        """The signs, as `Sign` sends them."""
        return {n: g.sign() * (g.abs().mean() if self.scaled and g.numel() else 1.0) for n, g in gradient.items()}

    def nearest(self, gradient: Gradient, sent: Gradient) -> Gradient:
        """The gradient of the signs that were sent that is closest to `gradient`: zero where the sign is wrong.

        Args:
            gradient: one tensor per parameter.
            sent: the signs, at any positive scale.

        Returns:
            `gradient` where its sign is right, else 0; differentiable.
        """
        return {n: torch.where(g * sent[n] > 0, g, torch.zeros_like(g)) for n, g in gradient.items()}


@dataclass(frozen=True, kw_only=True)
class Quantisation(Transformation):
    """Round each element to one of `2^bits` equally spaced levels between the tensor's extremes `-m` and `m`.

    Args:
        bits: For each element, 1 to 16.
        stochastic: Round up or down at random, without bias (Alistarh et al. 2017, QSGD), instead of to the nearest.

    Raises:
        InputError: If `bits` is outside its range.
    """

    bits: int = 4
    stochastic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 16:
            raise InputError(f"`bits` must be a whole number from 1 to 16, got {self.bits!r}.")

    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """Each tensor at its levels."""
        sent = {}
        for name, g in gradient.items():
            largest = _largest(g)
            shift: Tensor | float = 0.5
            if self.stochastic:  # standard normal numbers as uniform ones, by the law's distribution function
                shift = torch.special.ndtr(
                    randn(g.shape, g, generator, name).to(torch.promote_types(g.dtype, torch.float32))
                )
            sent[name] = _rounded(g, largest, 2**self.bits - 1, shift)
        return sent

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """The levels: each element is within half a step of what was sent.

        Random rounding is unbiased, so that its errors average out over elements: it is declared as noise with a step's
        squared over 6 as its variance (at a place drawn evenly), which tells more than the interval.

        Args:
            release: what was protected.
            message: what is sent.

        Returns:
            The declaration.
        """
        largest, steps = {n: _largest(g) for n, g in release.gradient.items()}, 2**self.bits - 1
        if self.stochastic:
            return Knowledge(variance={n: (2 * m / steps) ** 2 / 6 for n, m in largest.items()})
        return Knowledge(transforms=(Levels(largest=largest, steps=steps),))


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Rounding to levels as an attacker uses it.

    Args:
        largest: `m` of each tensor: the outermost levels are `-m` and `m`.
        steps: between them.
    """

    name: ClassVar[str] = "quantisation"
    straight_through: ClassVar[bool] = True
    largest: Mapping[str, Tensor] = field(repr=False, hash=False)
    steps: int

    def __call__(self, gradient: Gradient) -> Gradient:
        """Each element at its nearest level."""
        return {n: _rounded(g, self.largest[n].to(g), self.steps, 0.5) for n, g in gradient.items()}

    def nearest(self, gradient: Gradient, sent: Gradient) -> Gradient:
        """The gradient closest to `gradient` of those that are rounded to `sent`.

        Args:
            gradient: one tensor per parameter.
            sent: the message.

        Returns:
            `gradient`, clamped to the interval of each element's level; differentiable.
        """
        found = {}
        for name, g in gradient.items():
            reach = self.largest[name].to(g) / self.steps
            found[name] = torch.maximum(torch.minimum(g, sent[name] + reach), sent[name] - reach)
        return found


def _largest(g: Tensor) -> Tensor:
    return g.abs().max() if g.numel() else g.new_zeros(())


def _rounded(g: Tensor, largest: Tensor, steps: int, shift: Tensor | float) -> Tensor:
    """`g` at the level `floor(. + shift)`; itself where all of it is zero."""
    wide = torch.promote_types(g.dtype, torch.float32)
    unit = largest.to(wide).clamp_min(torch.finfo(wide).tiny)
    level = ((g.to(wide) / unit + 1) * (steps / 2) + shift).floor().clamp(0, steps)
    return torch.where(largest > 0, (level * (2 / steps) - 1) * unit, torch.zeros_like(unit)).to(g.dtype)
