"""What is assumed of the attacker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import InputError

#: How far beyond the value range an input may lie, as a share of its span: rounding.
RANGE_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """What the attacker knows beside the model, the loss and the sent gradient.

    `others_known`: the attacker knows every example of the batch but one, for each one in turn (the worst case; an
        attack then sees that example's own gradient and all of the noise). `False`: the whole batch is unknown and
        attacked as one.
    `labels_known`: the attacker has the labels; otherwise attacks infer them.
    `max_attacked`: how many examples are attacked, those that leak most by the closed-form measures.
    `value_range`: `(low, high)` of valid inputs; PSNR, SSIM and the policy's shares are computed in it, and inputs
        outside it are refused. `None`: unknown to the attacker, for embeddings and the like; the numbers are then
        computed in the range of the batch's own values.
    """

    others_known: bool = True
    labels_known: bool = True
    max_attacked: int = 4
    value_range: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.max_attacked < 1:
            raise InputError(f"`max_attacked` must be at least 1, got {self.max_attacked}.")
        check_value_range(self.value_range)

    def check_inputs(self, inputs: Tensor) -> None:
        """Raise `InputError` for `inputs` outside the value range."""
        check_in_range(inputs, self.value_range)

    def range_of(self, inputs: Tensor) -> tuple[float, float]:
        """The range that numbers on `inputs` are computed in: the value range, or that of their own values."""
        if self.value_range is not None:
            return self.value_range
        low, high = (v.item() for v in torch.aminmax(inputs.detach()))
        return low, high if high > low else low + 1.0


def check_value_range(value_range: tuple[float, float] | None) -> None:
    """Raise `InputError` unless `value_range` is `(low, high)` with finite `low < high`, or `None`."""
    if value_range is None:
        return
    if not isinstance(value_range, tuple | list) or len(value_range) != 2:
        raise InputError(f"`value_range` must be (low, high) or None, got {value_range!r}.")
    low, high = value_range
    if not -float("inf") < low < high < float("inf"):
        raise InputError(f"`value_range` must be (low, high) with low < high, got {value_range}.")


def check_in_range(inputs: Tensor, value_range: tuple[float, float] | None) -> None:
    """Raise `InputError` if a value of `inputs` lies outside `value_range`, beyond rounding; `None` allows all.

    PSNR in a wrong range is wrong by a constant that can hide anything: a picture in 0..255 that is recovered exactly
    but for rounding would be scored as noise.
    """
    if value_range is None or not isinstance(inputs, Tensor) or inputs.numel() == 0 or inputs.device.type == "meta":
        return  # what is no batch at all is refused elsewhere, in better words
    low, high = value_range
    slack = RANGE_SLACK * (high - low)
    smallest, largest = (v.item() for v in torch.aminmax(inputs.detach()))
    if smallest < low - slack or largest > high + slack:
        raise InputError(
            f"`inputs` span {smallest:.6g} to {largest:.6g}, outside the value range [{low:g}, {high:g}] that PSNR and "
            "the policy are computed in. Say what range they have: `ThreatModel(value_range=(low, high))`, "
            "`value_range=(low, high)` where a function takes it, `--value-range LOW,HIGH` on the command line (0,255 "
            "for bytes; None for inputs without a range, such as embeddings). For pictures that were normalised, let "
            "the model do that and give the pictures as they are."
        )
