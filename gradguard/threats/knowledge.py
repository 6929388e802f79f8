"""What an attacker knows of a defense: what defenses declare and adaptive attacks are built from.

Attacks and defenses meet here. A defense that declares what it did cannot choose a weak attacker: the attack that knows
it is made from the declaration. Whatever is not in it is no secret either, only unknown to gradguard's own attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gradguard.functional.vectors import Gradient

#: A symmetric product on input space: `(R, *input_shape)` in, the same shape out.
Product = Callable[[Tensor], Tensor]


class Transform(Protocol):
    """A step that a defense takes with a message, drawing nothing secret: what an attacker does with a trial gradient.

    `name`: in tables ("clip", "sign"). `straight_through`: whether the derivative is to be taken as if the step were
    the identity (sign, rounding), since its own is zero almost everywhere.

    A step may also have `nearest(gradient, sent) -> Gradient`: of all gradients that it takes to `sent`, the closest
    one to `gradient`, differentiable. As a last step it is then matched by the distance from that set, which
    is smooth and zero at the truth.
    """

    @property
    def name(self) -> str:
        """In tables."""

    @property
    def straight_through(self) -> bool:
        """Whether the derivative is taken as the identity's."""

    def __call__(self, gradient: Gradient) -> Gradient:
        """The step on a gradient, differentiable unless `straight_through`.

        Args:
            gradient: one tensor per parameter.

        Returns:
            The message, the same names and shapes.
        """


@dataclass(frozen=True, kw_only=True)
class InOtherUnits:
    """A step on gradients that are given times `factor`: `v -> factor T(v / factor)`."""

    step: Transform
    factor: float

    @property
    def name(self) -> str:
        """The step's."""
        return self.step.name

    @property
    def straight_through(self) -> bool:
        """The step's."""
        return self.step.straight_through

    def __call__(self, gradient: Gradient) -> Gradient:
        """The step in the other units."""
        return self._times(self.step(self._times(gradient, 1 / self.factor)), self.factor)

    @property
    def nearest(self) -> Callable[[Gradient, Gradient], Gradient] | None:
        """The step's, in the other units; `None` if it has none."""
        nearest = getattr(self.step, "nearest", None)
        if nearest is None:
            return None
        return lambda gradient, sent: self._times(
            nearest(self._times(gradient, 1 / self.factor), self._times(sent, 1 / self.factor)), self.factor
        )

    @staticmethod
    def _times(gradient: Gradient, factor: float) -> Gradient:
        return {n: g * factor for n, g in gradient.items()}


@dataclass(frozen=True, kw_only=True)
class NoiseFilter:
    """How noise is correlated over the rounds of a stream: `n = std C^{-1} w`, `w` white.

    Args:
        column: first column of the lower-triangular Toeplitz matrix `C`, shape `(n,)` float64, for as many rounds as
            are known.
        std: of `w`, gradient units, positive.
        round: of this message within the stream, from 0.
        learning_rates: `eta_t` of the rounds until this one where the stream cancels `eta_t n_t`; then the matrix is
            `C_ts eta_s / eta_t`. `None`: constant.
    """

    column: Tensor = field(repr=False)
    std: float
    round: int
    learning_rates: tuple[float, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the receiver of a message knows of how it was perturbed: everything but the secret numbers.

    Args:
        variance: of independent noise on each element, gradient units squared: a number, or one or a tensor for each
            parameter; `None`: none was drawn there. With a `filter` it is that of this message alone.
        displacement: `u -> K u` on inputs `(R, *input_shape)`, for noise `J^T d` with `d ~ N(0, K)`.
        filter: for noise that is correlated over rounds.
        transforms: the deterministic steps, in order.
        scale: the factor on the gradient before noise; `None`: unknown to the attacker (clipping by a secret norm).
        mask: which elements carry anything, a bool tensor for each parameter; what is False was not sent.
        left_out: parameters whose gradient says nothing reliable of the input, since the defense works on them
            (Soteria's layer, PRECODE's bottleneck): an attack does better without them.
        random_model: whether the model itself draws secret randomness in the forward pass.
        secret: whether the noise came from the operating system's entropy and not from a seed.
    """

    variance: float | Mapping[str, float | Tensor] | None = field(default=None, repr=False)
    displacement: Product | None = field(default=None, repr=False)
    filter: NoiseFilter | None = None
    transforms: tuple[Transform, ...] = ()
    scale: float | None = 1.0
    mask: Mapping[str, Tensor] | None = field(default=None, repr=False)
    left_out: tuple[str, ...] = ()
    random_model: bool = False
    secret: bool = True

    @property
    def noisy(self) -> bool:
        """Whether anything secret was drawn."""
        return self.variance is not None or self.displacement is not None or self.random_model

    def scaled(self, factor: float) -> Knowledge:
        """What is known of the message times a number: of the same message in other units.

        Args:
            factor: not 0.

        Returns:
            The declaration for it. `scale` stays, since the gradient is in the new units too.
        """
        if factor == 1.0:
            return self
        variance = self.variance
        if isinstance(variance, Mapping):
            variance = {n: v * factor**2 for n, v in variance.items()}
        elif variance is not None:
            variance = variance * factor**2
        noise = None if self.filter is None else replace(self.filter, std=self.filter.std * abs(factor))
        steps = tuple(InOtherUnits(step=t, factor=factor) for t in self.transforms)
        return replace(self, variance=variance, filter=noise, transforms=steps)

    def then(self, later: Knowledge) -> Knowledge:
        """What is known after a second step on the same message.

        Args:
            later: of the second step. Independent noises add; a filter is kept with the step that has it.

        Returns:
            Of both together. Noise before a nonlinear transform is counted as if it came after: an approximation that
            the transform's own step (`Compose`) avoids by declaring what is left.
        """
        return replace(
            later,
            variance=_sum(self.variance, later.variance),
            displacement=_sum_products(self.displacement, later.displacement),
            filter=later.filter or self.filter,
            transforms=(*self.transforms, *later.transforms),
            scale=None if self.scale is None or later.scale is None else self.scale * later.scale,
            mask=_both(self.mask, later.mask),
            left_out=tuple(dict.fromkeys((*self.left_out, *later.left_out))),
            random_model=self.random_model or later.random_model,
            secret=self.secret and later.secret,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for records: what was declared, without tensors."""
        return {
            "noise": [
                kind
                for kind, there in (
                    ("parameters", self.variance is not None),
                    ("inputs", self.displacement is not None),
                    ("model", self.random_model),
                )
                if there
            ],
            "correlated": self.filter is not None,
            "transforms": [t.name for t in self.transforms],
            "scale": self.scale,
            "masked": self.mask is not None,
            "left_out": list(self.left_out),
            "secret": self.secret,
        }


#: What is known of a message that no defense changed.
NOTHING_DONE = Knowledge()

Unit = Literal["example", "client"]


def _sum(
    one: float | Mapping[str, float | Tensor] | None, other: float | Mapping[str, float | Tensor] | None
) -> float | Mapping[str, float | Tensor] | None:
    if one is None or other is None:
        return other if one is None else one
    if not isinstance(one, Mapping) and not isinstance(other, Mapping):
        return one + other
    names = list(one if isinstance(one, Mapping) else other)  # type: ignore[arg-type]

    def of(variance: float | Mapping[str, float | Tensor], name: str) -> float | Tensor:
        return variance.get(name, 0.0) if isinstance(variance, Mapping) else variance

    return {n: of(one, n) + of(other, n) for n in names}


def _sum_products(one: Product | None, other: Product | None) -> Product | None:
    if one is None or other is None:
        return other if one is None else one
    return lambda u: one(u) + other(u)


def _both(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    if one is None or other is None:
        return other if one is None else one
    return {n: torch.logical_and(m, other[n]) if n in other else m for n, m in one.items()}
