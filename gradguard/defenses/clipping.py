"""Clipping: what bounds how much one example, or one client's update, can change a message."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.defenses.base import Defense
from gradguard.defenses.protector import Protector
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.stream import NoiseStream
from gradguard.defenses.strengths import require_positive
from gradguard.errors import InputError
from gradguard.functional.clipped import weighted_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.problems import is_separable_by_class
from gradguard.functional.vectors import Gradient, norm
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The step on a trial gradient: scaled down to `max_norm` where it is longer.

    For a message of one example this is what was done; for more it is what is known of their mean.

    Args:
        max_norm: gradient units.
        per_layer: each tensor to `max_norm / sqrt(number of tensors)` by itself.
    """

    max_norm: float
    per_layer: bool = False
    name: ClassVar[str] = "clip"
    straight_through: ClassVar[bool] = False

    def __call__(self, gradient: Gradient) -> Gradient:
        """As `Transform`."""
        if not self.per_layer:
            factor = _factor(norm(gradient), self.max_norm)
            return {n: g * factor for n, g in gradient.items()}
        limit = self.max_norm / max(len(gradient), 1) ** 0.5
        return {n: g * _factor(torch.linalg.vector_norm(g), limit) for n, g in gradient.items()}


def _factor(length: Tensor, limit: float) -> Tensor:
    return (limit / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)


@dataclass(frozen=True, kw_only=True)
class ClipPerExample(Defense):
    """Clip each example's share in the batch's gradient, and send the sum of what is left.

    An example's share is what the batch's own loss makes it: class weights, ignored targets and sums are in it. `B`
    times the share (the example's own gradient, where the loss is a mean) is clipped to `max_norm`. Known from DP-SGD
    (Abadi et al. 2016, Algorithm 1).

    Adding or removing one example then changes the message by at most `max_norm / B` with `B` (or
    `expected_batch_size`) held fixed: that is the sensitivity it declares. Replacing one changes it by up to twice
    that. Where the loss divides by something that depends on all examples (class weights, ignored targets), one example
    moves the others' shares too, and no sensitivity is declared.

    Args:
        max_norm: Gradient units, positive. With `quantile` the first round's.
        per_layer: Clip every tensor by itself, each to `max_norm / sqrt(number of tensors)`: together at most
            `max_norm`.
        expected_batch_size: What sums are divided by, for Poisson sampling, where `B` itself is random and secret.
            Default: `B`.
        quantile: Let the norm follow this quantile of the examples' norms, in (0, 1) (Andrew et al. 2021, arXiv
            1905.03871, without their noise on the count: no (epsilon, delta) is then claimed).
        rate: How fast it follows, on a log scale.

    Raises:
        InputError: If an option is outside its range.
    """

    random: ClassVar[bool] = False
    needs_jacobian: ClassVar[bool] = True
    max_norm: float
    per_layer: bool = False
    expected_batch_size: float | None = None
    quantile: float | None = None
    rate: float = 0.2

    def __post_init__(self) -> None:
        require_positive(max_norm=self.max_norm, rate=self.rate)
        if self.expected_batch_size is not None:
            require_positive(expected_batch_size=self.expected_batch_size)
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise InputError(f"`quantile` must be in (0, 1), got {self.quantile}.")

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """The clipped gradient minus `gradient`."""
        assert jacobian is not None, "checked before"
        sent, _ = clipped(self, Release.of(jacobian, gradient), self.max_norm)
        return {n: sent.message[n] - g for n, g in gradient.items()}

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> ClippingProtector:
        return ClippingProtector(self, stream, generator=generator)


class ClippingProtector(Protector):
    """`ClipPerExample` at work: with `quantile` the norm moves from message to message."""

    defense: ClipPerExample

    def _begin(self) -> None:
        #: What the next message's examples are clipped to.
        self.max_norm = self._before = self.defense.max_norm

    def _protect(self, release: Release) -> Sent:
        sent, below = clipped(self.defense, release, self.max_norm)
        self._before = self.max_norm
        if self.defense.quantile is not None:
            self.max_norm *= math.exp(-self.defense.rate * (below - self.defense.quantile))
        return sent

    def _withdraw(self) -> None:
        self.max_norm = self._before

    def state_dict(self) -> dict[str, Any]:
        """As `Protector.state_dict`, with the norm."""
        return super().state_dict() | {"max_norm": self.max_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Protector.load_state_dict`, with the norm."""
        super().load_state_dict(state)
        self.max_norm = self._before = float(state["max_norm"])


def clipped(defense: ClipPerExample, release: Release, max_norm: float) -> tuple[Sent, float]:
    """A release with its examples clipped.

    Args:
        defense: the options.
        release: with its batch; its gradient must be that of the batch.
        max_norm: what to clip to.

    Returns:
        What to send, and the share of examples that were not longer.

    Raises:
        InputError: without the batch, or if the message is not the batch's gradient.
    """
    function, count = release.loss_gradient, release.batch_size
    if function is None:
        raise InputError("Clipping examples needs `Release(loss_gradient=LossGradient(model, loss_fn), ...)`.")
    _check_own(release)
    divisor = defense.expected_batch_size or count
    # The shares of a sum do not depend on `B`, those of a mean are 1/B of the examples' own gradients.
    summed = getattr(function.loss_fn, "reduction", None) == "sum"
    limit = max_norm / (divisor if summed else count)
    rescale = 1.0 if summed else count / divisor
    kept: list[Tensor] = []

    def factors(squares: Tensor) -> Tensor:
        if defense.per_layer:
            each = _factor(squares.sqrt(), limit / squares.shape[1] ** 0.5)
            kept.append((each >= 1).all(1))
            return each
        factor = _factor(squares.sum(1, keepdim=True).sqrt(), limit)
        kept.append(factor[:, 0] >= 1)
        return factor.expand_as(squares)

    found = weighted_gradient(function, release.inputs, release.targets, factors)
    message = found.gradient if rescale == 1 else {n: g * rescale for n, g in found.gradient.items()}
    below = torch.cat(kept).double().mean().item()
    knowledge = Knowledge(
        transforms=(Clip(max_norm=max_norm * count / divisor, per_layer=defense.per_layer),),
        scale=None if count == 1 else 1.0,
    )
    sensitivity = max_norm / divisor if _shares_are_apart(release) else None
    return Sent(message=message, knowledge=knowledge, cost={"clipped": 1 - below}, sensitivity=sensitivity), below


def _check_own(release: Release) -> None:
    """Refuse a message that is not the batch's gradient: it would be replaced by another without a word."""
    if release._gradient is None:
        return
    assert release.loss_gradient is not None
    own = release.loss_gradient(release.inputs, release.targets)
    gap = norm({n: release.gradient[n].to(g) - g for n, g in own.items()})
    if gap > 1e-2 * norm(own) + 1e-6:
        raise InputError(
            "The message is not the gradient of the batch, so its examples cannot be clipped. Put `ClipPerExample` "
            "first in `Compose`, and give it one step's gradient; `ClipUpdate` clips whole updates."
        )


def _shares_are_apart(release: Release) -> bool:
    """Whether an example's share depends on that example and `B` alone: known of torch's losses, else not claimed."""
    function, targets = release.loss_gradient, release.targets
    assert function is not None
    if not is_separable_by_class(function, targets) or not isinstance(targets, Tensor):
        return False
    loss: Any = function.loss_fn
    if not isinstance(loss, nn.Module):
        # A function of torch's, called without options: a mean.
        classes = loss in (F.cross_entropy, F.nll_loss)
        loss = nn.NLLLoss() if classes else nn.MSELoss()
    if loss.reduction not in ("mean", "sum"):
        return False
    if loss.reduction == "sum" or not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or targets.is_floating_point():
        return True
    # Means over what is not ignored, weighted by class: the others are in the denominator.
    may_ignore = targets.ndim > 1 or loss.ignore_index >= 0 or bool((targets == loss.ignore_index).any())
    return loss.weight is None and not may_ignore


@dataclass(frozen=True, kw_only=True)
class ClipUpdate(Defense):
    """Scale the whole message down to `max_norm` where it is longer: for the updates of clients.

    It bounds what one *client* can change, not one example: the sensitivity it declares is `max_norm` per client.

    Args:
        max_norm: Of the message, positive.

    Raises:
        InputError: If it is not positive.
    """

    random: ClassVar[bool] = False
    max_norm: float

    def __post_init__(self) -> None:
        require_positive(max_norm=self.max_norm)

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """The clipped message minus `gradient`."""
        return {n: c - gradient[n] for n, c in Clip(max_norm=self.max_norm)(gradient).items()}

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> Protector:
        return _UpdateProtector(self, stream, generator=generator)


class _UpdateProtector(Protector):
    defense: ClipUpdate

    def _protect(self, release: Release) -> Sent:
        clip = Clip(max_norm=self.defense.max_norm)
        return Sent(
            message=clip(release.gradient),
            knowledge=Knowledge(transforms=(clip,), scale=None),
            cost={"clipped": float(release.norm > self.defense.max_norm)},
            sensitivity=self.defense.max_norm,
        )
