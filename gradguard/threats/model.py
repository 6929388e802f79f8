"""What is assumed of the attacker."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """What the attacker knows beside the model, the loss and the sent gradient.

    `others_known`: the attacker knows every example of the batch but one, for each one in turn (the worst case; an
        attack then sees that example's own gradient and all of the noise). `False`: the whole batch is unknown and
        attacked as one.
    `labels_known`: the attacker has the labels; otherwise attacks infer them.
    `max_attacked`: how many examples are attacked, those that leak most by the closed-form measures.
    `value_range`: of valid inputs; PSNR is computed in it.
    """

    others_known: bool = True
    labels_known: bool = True
    max_attacked: int = 4
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.max_attacked < 1:
            raise InputError(f"`max_attacked` must be at least 1, got {self.max_attacked}.")
        low, high = self.value_range
        if not high > low:
            raise InputError(f"`value_range` must be (low, high) with low < high, got {self.value_range}.")
