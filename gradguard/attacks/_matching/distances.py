"""How far a trial's gradient is from the sent one: what gradient matching minimises.

All take gradients name by name, the trials' `(T, *parameter_shape)` and the sent one's `(T or 1, *parameter_shape)`,
and give one number per trial, `(T,)`, zero where they agree. The names are those that were sent.

Where the sent gradient is `c g` with a factor `c` that the attacker does not know, the distance is taken at the factor
that makes it least, which is known in closed form for each trial (`scaled`). By the envelope theorem its derivative is
that at this factor held fixed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.vectors import Gradient


@dataclass(frozen=True, kw_only=True)
class Distance(ABC):
    """Between gradients. A subclass defines `__call__`, differentiable by the first argument."""

    @abstractmethod
    def __call__(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, zero where the two agree."""

    def scale(self, own: Gradient, sent: Gradient) -> Tensor:
        """The factor `c` of `own` that comes closest to `sent`, of either sign: `(T,)`; unweighted by default."""
        return best_scale(own, sent)

    def scaled(self, own: Gradient, sent: Gradient) -> Tensor:
        """The distance of `c own` from `sent` at the best factor `c`: `(T,)`."""
        scale = self.scale(own, sent)
        return self({n: g * scale.reshape(-1, *[1] * (g.ndim - 1)) for n, g in own.items()}, sent)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise `InputError` if this distance does not fit gradients of these parameters, those that were sent."""


def best_scale(own: Gradient, sent: Gradient, weights: Mapping[str, float] | None = None) -> Tensor:
    """`c = <own, sent> / <own, own>`, which makes `|c own - sent|^2` least: `(T,)`; 0 where `own` is 0."""
    square = inner(own, own, weights)
    return inner(own, sent, weights) / square.clamp_min(torch.finfo(square.dtype).tiny)


def _row_sums(product: Tensor) -> Tensor:
    return product.reshape(len(product), -1).sum(1)


def inner(one: Gradient, other: Gradient, weights: Mapping[str, float] | None = None) -> Tensor:
    """`sum_n weights[n] <one_n, other_n>`: `(T,)`."""
    parts = [_row_sums(one[n] * other[n]) * (1.0 if weights is None else weights.get(n, 1.0)) for n in one]
    return torch.stack(torch.broadcast_tensors(*parts)).sum(0)


def difference(own: Gradient, sent: Gradient) -> Gradient:
    """`own - sent`."""
    return {n: g - sent[n] for n, g in own.items()}


@dataclass(frozen=True, kw_only=True)
class SquaredDistance(Distance):
    """`|own - sent|^2 / |sent|^2`: DLG's (Zhu et al. 2019, Eq. 2), free of the gradient's units.

    `weights`: per parameter name, on the squares; names that are not there weigh 1. Layers whose gradient a defense
    has replaced get 0.
    """

    weights: Mapping[str, float] | None = field(default=None, hash=False)

    def __call__(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`."""
        gap = difference(own, sent)
        return inner(gap, gap, self.weights) / inner(sent, sent, self.weights)

    def scale(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, under the weights."""
        return best_scale(own, sent, self.weights)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Weights are of parameters that there are."""
        check_weights(self.weights, parameters)


@dataclass(frozen=True, kw_only=True)
class CosineDistance(Distance):
    """`1 - <own, sent> / (|own| |sent|)` (Geiping et al. 2020, Eq. 4): says nothing about the gradient's length.

    `weights`: as in `SquaredDistance`.
    """

    weights: Mapping[str, float] | None = field(default=None, hash=False)

    def __call__(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, in [0, 2]."""
        product = inner(own, sent, self.weights)
        tiny = torch.finfo(product.dtype).tiny
        lengths = (inner(g, g, self.weights).clamp_min(tiny).sqrt() for g in (own, sent))
        return 1 - product / (next(lengths) * next(lengths))

    def scale(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, under the weights."""
        return best_scale(own, sent, self.weights)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Weights are of parameters that there are."""
        check_weights(self.weights, parameters)


@dataclass(frozen=True, kw_only=True)
class MahalanobisDistance(Distance):
    """`sum (own - sent)^2 / variance`, over the elements' number: for noise of a known law on the sent gradient.

    With Gaussian noise of independent elements it is the negative log-likelihood, up to a constant and a factor.
    `variance`: of the noise, one number for all elements, or by parameter name a number or a tensor of its shape.
    """

    variance: float | Mapping[str, float | Tensor] = field(hash=False)

    def __call__(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, about 1 at the truth."""
        gap = difference(own, sent)
        scaled = {n: g / self._of(n, g) for n, g in gap.items()}
        return inner(scaled, gap) / sum(g[0].numel() for g in own.values())

    def scale(self, own: Gradient, sent: Gradient) -> Tensor:
        """`(T,)`, the likeliest factor."""
        white = {n: g / self._of(n, g) for n, g in own.items()}
        square = inner(white, own)
        return inner(white, sent) / square.clamp_min(torch.finfo(square.dtype).tiny)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Every parameter has a positive variance."""
        for name, parameter in parameters.items():
            if isinstance(self.variance, Mapping) and name not in self.variance:
                raise InputError(f"`variance` has no entry for {name!r}: give one number, or one per parameter.")
            value = torch.as_tensor(self._of(name, parameter))
            if value.ndim and value.shape != parameter.shape:
                raise InputError(
                    f"`variance` of {name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}."
                )
            if not (torch.isfinite(value) & (value > 0)).all():
                raise InputError(f"`variance` of {name!r} must be positive and finite.")

    def _of(self, name: str, like: Tensor) -> float | Tensor:
        value = self.variance[name] if isinstance(self.variance, Mapping) else self.variance
        return value.to(like) if isinstance(value, Tensor) else value


def check_weights(weights: Mapping[str, float] | None, parameters: Mapping[str, Tensor]) -> None:
    """Raises `InputError` for weights that are negative, all zero, or of unknown names."""
    if weights is None:
        return
    unknown = sorted(set(weights) - set(parameters))
    if unknown:
        raise InputError(
            f"`weights` name {unknown[:3]}, which are no parameters whose gradient was sent; there are "
            f"{list(parameters)[:5]}, for instance."
        )
    if min(weights.values(), default=0.0) < 0:
        raise InputError("`weights` must not be negative.")
    if not any(weights.get(n, 1.0) > 0 for n in parameters):
        raise InputError("`weights` are zero for every parameter: nothing is left to match.")
