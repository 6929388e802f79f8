"""How close attacks came, and the one way to sum that up: the worst example, the best attack, and what a NaN means.

A NaN is a number that is missing, and what is missing may be the worst: `highest` and `lowest` are NaN if any value is,
and a NaN meets no policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


def highest(values: Iterable[float]) -> float | None:
    """The largest value, NaN if any is NaN; `None` of no values."""
    found = list(values)
    if any(math.isnan(value) for value in found):
        return math.nan
    return max(found, default=None)


def lowest(values: Iterable[float]) -> float | None:
    """The smallest value, NaN if any is NaN; `None` of no values."""
    found = list(values)
    if any(math.isnan(value) for value in found):
        return math.nan
    return min(found, default=None)


@dataclass(frozen=True, kw_only=True)
class AttackScore:
    """How close one attack came to the truth, per example attacked.

    Args:
        psnr: One per example, dB in the value range.
        ssim: One per example, in [-1, 1]; NaN for inputs that are no pictures.
        mse: One per example, input units squared.
        matching_loss: The attack's own relative squared gradient distance, mean over observations.
        converged: Share of observations on which the attack converged by its own criterion.
        seconds: Wall clock over all observations.
        failure: Why the attack could not run; the lists are then empty.
        pictures: The reconstructions, shape `(examples, *input_shape)`. Private: written nowhere unless asked for.
    """

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    matching_loss: float = float("nan")
    converged: float = 0.0
    seconds: float = float("nan")
    failure: str | None = None
    pictures: Tensor | None = field(default=None, repr=False)

    @property
    def best_psnr(self) -> float | None:
        """dB, on the example that it recovers best; `None` if it did not run."""
        return highest(self.psnr)

    @property
    def best_ssim(self) -> float | None:
        """SSIM of the example that it recovers best; `None` if it did not run or the inputs are no pictures."""
        return None if all(math.isnan(value) for value in self.ssim) else highest(self.ssim)


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How much of the labels was recovered. Shares are in [0, 1]; see `leakage.LabelRecovery`.

    Args:
        le_acc: Share of the `C` classes whose presence was recovered rightly.
        ln_acc: Share of the `C` classes whose count was recovered rightly.
        i_rec: `sum_c min(n_hat_c, n_c) / B`.
        recovered: Counts per class, as recovered.
        true: Counts per class.
    """

    le_acc: float
    ln_acc: float
    i_rec: float
    recovered: list[int] = field(default_factory=list)
    true: list[int] = field(default_factory=list)


def best_psnr(scores: Iterable[AttackScore]) -> float | None:
    """The highest PSNR (dB) of any attack on any example; `None` where nothing was reconstructed."""
    return highest(value for score in scores for value in score.psnr)


def best_ssim(scores: Iterable[AttackScore]) -> float | None:
    """The highest SSIM of any attack on any example.

    Inputs that are no pictures have a NaN at every example, which says nothing; a NaN beside numbers is one missing.

    Args:
        scores: Of the attacks.

    Returns:
        In [-1, 1]; `None` without reconstructions, or of inputs that are no pictures.
    """
    return highest(value for value in (score.best_ssim for score in scores) if value is not None)


def best_labels(scores: Mapping[str, LabelScore]) -> LabelScore | None:
    """The score of the attack that recovers most labels (IRec, then LnAcc); a NaN counts as the most."""
    if not scores:
        return None
    return max(scores.values(), key=lambda s: (math.inf if math.isnan(s.i_rec) else s.i_rec, s.ln_acc, s.le_acc))


def best_per_example(scores: Iterable[AttackScore], count: int) -> list[float | None]:
    """The highest PSNR (dB) of any attack on each of the `count` attacked examples."""
    found = list(scores)
    return [highest(s.psnr[place] for s in found if place < len(s.psnr)) for place in range(count)]
