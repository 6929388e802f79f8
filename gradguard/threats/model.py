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

    Args:
        others_known: The attacker knows every example of the batch but one, for each one in turn. This is the worst
            case: an attack then sees that example's own gradient and all of the noise. `False`: the whole batch is
            unknown and attacked as one.
        labels_known: The attacker has the labels. `False`: attacks infer them.
        max_attacked: How many examples are attacked, at least 1: those that leak most by the closed-form measures. With
            `others_known=False` all are.
        value_range: `(low, high)` of valid inputs. PSNR, SSIM and the policy's shares are computed in it, and inputs
            outside it are refused. `None`: unknown to the attacker, for embeddings and the like; the numbers are then
            computed in the range of the batch's own values.

    Raises:
        InputError: `max_attacked` is below 1, or `value_range` is no `(low, high)` with finite `low < high`.
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
        """The range that numbers on `inputs` are computed in.

        Args:
            inputs: Of any shape, at least one element.

        Returns:
            `(low, high)`: the value range, or where that is `None` the smallest and largest of `inputs`
                (`(low, low + 1)` if they are equal).
        """
        if self.value_range is not None:
            return self.value_range
        low, high = (v.item() for v in torch.aminmax(inputs.detach()))
        return low, high if high > low else low + 1.0


def check_value_range(value_range: tuple[float, float] | None) -> None:
    """Check a value range.

    Args:
        value_range: `(low, high)`, or `None` for no range.

    Raises:
        InputError: It is something else, or not `low < high` with both finite.
    """
    if value_range is None:
        return
    if not isinstance(value_range, tuple | list) or len(value_range) != 2:
        raise InputError(f"`value_range` must be (low, high) or None, got {value_range!r}.")
    low, high = value_range
    if not -float("inf") < low < high < float("inf"):
        raise InputError(f"`value_range` must be (low, high) with low < high, got {value_range}.")


def check_in_range(inputs: Tensor, value_range: tuple[float, float] | None) -> None:
    """Refuse inputs outside the value range. Rounding is allowed for: `RANGE_SLACK` of the range's span.

    PSNR in a wrong range is wrong by a constant that can hide anything: a picture in 0..255 that is recovered exactly
    but for rounding would be scored as noise.

    Args:
        inputs: Of any shape. What is no tensor, or holds no element, passes: it is refused elsewhere, in better words.
        value_range: `(low, high)`; `None` allows all.

    Raises:
        InputError: A value lies outside.
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
