"""What the owner of the data asks of a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradguard.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Thresholds that a gradient must meet to be sent. `None` leaves a threshold out.

    `minimum_predicted_error`: of the worst example, the root mean squared error per element that I2F predicts for a
        perfect attacker, as a fraction of the value range (0.1 is a PSNR of 20 dB).
    `maximum_attacked_psnr`: dB, of the best attack on the worst example. Only where attacks are run.
    `maximum_label_recovery`: `IRec`, the share of the batch's labels that is recovered, in [0, 1]. Off by default:
        noise that hides pictures rarely hides labels, and many uses do not ask it to.
    """

    minimum_predicted_error: float | None = 0.1
    maximum_attacked_psnr: float | None = 20.0
    maximum_label_recovery: float | None = None

    def __post_init__(self) -> None:
        if self.minimum_predicted_error is not None and self.minimum_predicted_error < 0:
            raise InputError(f"`minimum_predicted_error` must not be negative, got {self.minimum_predicted_error}.")
        if self.maximum_label_recovery is not None and not 0 <= self.maximum_label_recovery <= 1:
            raise InputError(f"`maximum_label_recovery` must be in [0, 1], got {self.maximum_label_recovery}.")

    def complaints(self, measures: Mapping[str, float]) -> list[str]:
        """What is wrong with a gradient that has these `measures`: a sentence each, none if it may be sent.

        `measures`: any of `predicted_error` (fraction of the value range), `attacked_psnr` (dB) and
        `label_recovery` (share); one that was not measured is not judged, and one that is not a number fails.
        """
        rules = (
            (
                "predicted_error",
                self.minimum_predicted_error,
                False,
                "the predicted error of a perfect attacker is {:.3g} of the value range, below {:.3g}",
            ),
            (
                "attacked_psnr",
                self.maximum_attacked_psnr,
                True,
                "an attack reconstructs an example at {:.1f} dB, above {:.1f} dB",
            ),
            (
                "label_recovery",
                self.maximum_label_recovery,
                True,
                "{:.0%} of the labels are recovered, more than {:.0%}",
            ),
        )
        found = []
        for name, limit, is_maximum, sentence in rules:
            if limit is None or name not in measures:
                continue
            value = measures[name]
            # Written so that NaN fails.
            fine = value <= limit if is_maximum else value >= limit
            if not fine:
                found.append(sentence.format(value, limit))
        return found
