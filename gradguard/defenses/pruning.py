"""Magnitude pruning: send only the largest elements of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.base import Defense
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class Pruning(Defense):
    """Set the `fraction` of elements that are smallest in magnitude, over all parameters, to zero.

    Known from gradient compression (Lin et al. 2018) and evaluated as a defense in DLG (Zhu et al. 2019, section 5).
    """

    random: ClassVar[bool] = False
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"`fraction` must be in (0, 1), got {self.fraction}.")

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """Minus the pruned elements."""
        magnitude = flatten(gradient).abs()
        count = int(self.fraction * magnitude.numel())
        if count == 0:
            return {n: torch.zeros_like(g) for n, g in gradient.items()}
        # `kthvalue`, since `torch.quantile` refuses more than 16 million elements.
        threshold = magnitude.kthvalue(count).values
        # Of equal magnitudes, as a quantised gradient has them, the first ones go: `fraction` is kept to.
        equal = magnitude == threshold
        pruned = (magnitude < threshold) | (equal & (equal.cumsum(0) <= count - (magnitude < threshold).sum()))
        masks = unflatten(pruned, gradient)
        return {n: torch.where(masks[n], -g, torch.zeros_like(g)) for n, g in gradient.items()}
