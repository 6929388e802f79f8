"""What the owner of the data asks of a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradguard.errors import InputError


@dataclass(frozen=True)
class Rule:
    """One threshold: which measure it judges, from which side, and what it says.

    Args:
        measure: Its name in the measures.
        option: The policy's field with the threshold.
        is_maximum: Whether the measure must not exceed the threshold. `False`: it must not fall below it.
        what: What it judges, in words.
        complaint: A format string for the value and the threshold.
    """

    measure: str
    option: str
    is_maximum: bool
    what: str
    complaint: str


RULES = (
    Rule(
        "predicted_error",
        "minimum_predicted_error",
        False,
        "the predicted error",
        "the predicted error of gradient matching is {:.3g} of the value range, below {:.3g}",
    ),
    Rule(
        "attacked_psnr",
        "maximum_attacked_psnr",
        True,
        "the PSNR of attacks",
        "an attack reconstructs an example at {:.1f} dB, above {:.1f} dB",
    ),
    Rule(
        "attacked_ssim",
        "maximum_attacked_ssim",
        True,
        "the SSIM of attacks",
        "an attack makes an example recognisable, at an SSIM of {:.2f}, above {:.2f}",
    ),
    Rule(
        "label_recovery",
        "maximum_label_recovery",
        True,
        "labels",
        "{:.0%} of the labels are recovered, more than {:.0%}",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Thresholds that a gradient must meet to be sent. `None` leaves a threshold out; a verdict says which are.

    Args:
        minimum_predicted_error: Of the worst example, the root mean squared error per element that I2F (Zhang et al.
            2023, Eq. 4) predicts for gradient matching, as a share of the value range, at least 0 (0.1 is a PSNR of 20
            dB). An attacker who also knows what pictures look like can come closer.
        maximum_attacked_psnr: Of the best attack on the worst example, dB. It judges only where attacks are run.
        maximum_attacked_ssim: Of the best attack on the worst example where inputs are pictures, in [-1, 1]: whether it
            can be recognised, which PSNR does not say. The default was measured on scikit-learn's digits (8x8). Another
            picture of the same class gets 0.89 or less (95% of 64; median 0.72), the mean of the others 0.73 at most,
            and noise at 20 dB leaves 0.94 or more. On larger pictures the default is lenient (noise at 20 dB leaves
            0.57 at 32x32): set a lower one there, such as 0.5.
        maximum_label_recovery: `IRec`, the share of the batch's labels that is recovered, in [0, 1]. Off by default:
            noise that hides pictures rarely hides labels, and many uses do not ask it to.
        accept_unproven: Let a gradient be sent that meets the thresholds though nothing proves it: no attack works
            without a defense either, or the predictions did not converge. The verdict still says so.

    Raises:
        InputError: A threshold is outside its range or not a number.
    """

    minimum_predicted_error: float | None = 0.1
    maximum_attacked_psnr: float | None = 20.0
    maximum_attacked_ssim: float | None = 0.9
    maximum_label_recovery: float | None = None
    accept_unproven: bool = False

    def __post_init__(self) -> None:
        # Written so that NaN is refused.
        if self.minimum_predicted_error is not None and not self.minimum_predicted_error >= 0:
            raise InputError(f"`minimum_predicted_error` must not be negative, got {self.minimum_predicted_error}.")
        if self.maximum_attacked_psnr is not None and self.maximum_attacked_psnr != self.maximum_attacked_psnr:
            raise InputError(f"`maximum_attacked_psnr` must be a number in dB, got {self.maximum_attacked_psnr}.")
        if self.maximum_attacked_ssim is not None and not -1 <= self.maximum_attacked_ssim <= 1:
            raise InputError(f"`maximum_attacked_ssim` must be in [-1, 1], got {self.maximum_attacked_ssim}.")
        if self.maximum_label_recovery is not None and not 0 <= self.maximum_label_recovery <= 1:
            raise InputError(f"`maximum_label_recovery` must be in [0, 1], got {self.maximum_label_recovery}.")

    def limit(self, rule: Rule) -> float | None:
        """The threshold of a rule, `None` where it is left out."""
        return getattr(self, rule.option)

    def judges(self, *measures: str) -> bool:
        """Whether any of these measures has a threshold.

        Args:
            *measures: Names, as in `Rule.measure`.

        Returns:
            `True` if one of them has.
        """
        return any(rule.measure in measures and self.limit(rule) is not None for rule in RULES)

    def complaints(self, measures: Mapping[str, float]) -> list[str]:
        """What is wrong with a gradient that has these `measures`: a sentence each, none if it may be sent.

        Args:
            measures: Any of `predicted_error` (fraction of the value range), `attacked_psnr` (dB), `attacked_ssim` and
                `label_recovery` (share). One that was not measured is not judged; one that is not a number fails.

        Returns:
            The complaints.
        """
        found = []
        for rule in RULES:
            limit = self.limit(rule)
            if limit is None or rule.measure not in measures:
                continue
            value = measures[rule.measure]
            # Written so that NaN fails.
            fine = value <= limit if rule.is_maximum else value >= limit
            if not fine:
                found.append(rule.complaint.format(value, limit))
        return found

    def not_judged(self, measures: Mapping[str, float] | None = None) -> list[str]:
        """What this policy leaves out, in words.

        Args:
            measures: The measured numbers by name. With `label_recovery` among them, the sentence on labels gives its
                value.

        Returns:
            One sentence per threshold that is `None`.
        """
        found = []
        for rule in RULES:
            if self.limit(rule) is None:
                value = (measures or {}).get(rule.measure)
                known = f" ({value:.0%} of them are recovered)" if rule.what == "labels" and value is not None else ""
                verb = "are" if rule.what == "labels" else "is"
                found.append(f"{rule.what} {verb} not judged{known}: set {rule.option}")
        return found
