"""Pruning: some elements of the gradient are sent as zero, and which ones is plain to see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.defenses.draws import randn
from gradguard.defenses.release import Release
from gradguard.defenses.transforms.base import Transformation, check_fraction
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, flatten, unflatten
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Pruning(Transformation):
    """Set the elements that are smallest in magnitude, over all parameters, to zero (top-k sparsification).

    Known from gradient compression (Lin et al. 2018) and evaluated as a defense in DLG (Zhu et al. 2019, section 5).
    What is zero counts as not sent: an attack that matches the other elements alone does much better.

    Args:
        fraction: Share of the elements that is dropped, in (0, 1).

    Raises:
        InputError: If `fraction` is outside its range.
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """The largest elements, zero for the others."""
        return without(gradient, smallest(flatten(gradient).abs(), self.fraction))

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """What is zero was not sent."""
        mask = {n: m != 0 for n, m in message.items()}
        return Knowledge(mask=None if all(bool(m.all()) for m in mask.values()) else mask)


#: By its name in gradient compression: the `1 - fraction` largest elements are sent.
TopK = Pruning


@dataclass(frozen=True, kw_only=True)
class RandomPruning(Transformation):
    """Set elements drawn at random, over all parameters, to zero; which ones is visible in the message.

    Args:
        fraction: Share of the elements that is dropped, in (0, 1), exact for each message.

    Raises:
        InputError: If `fraction` is outside its range.
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """The elements that chance keeps, zero for the others."""
        scores = flatten({n: randn(g.shape, g, generator, n) for n, g in gradient.items()})
        return without(gradient, smallest(scores, self.fraction))

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """What was dropped was not sent; elements that are zero by themselves say so."""
        return Knowledge(mask={n: (m != 0) | (release.gradient[n] == 0) for n, m in message.items()})


def smallest(scores: Tensor, fraction: float) -> Tensor:
    """Which elements of a vector are the `fraction` smallest: bool, its shape.

    Args:
        scores: shape `(P,)`.
        fraction: in (0, 1); rounded down to whole elements.

    Returns:
        A mask. Of equal ones, as a quantised gradient has them, the first go: `fraction` is kept to.
    """
    count = int(fraction * scores.numel())
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # `kthvalue`, since `torch.quantile` refuses more than 16 million elements.
    threshold = scores.kthvalue(count).values
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))


def without(gradient: Gradient, pruned: Tensor) -> Gradient:
    """`gradient` with zeros where the flat mask `pruned` holds."""
    masks = unflatten(pruned, gradient)
    return {n: torch.where(masks[n], torch.zeros_like(g), g) for n, g in gradient.items()}
