"""Accountants: what a Gaussian mechanism costs in (epsilon, delta), and how much noise a budget asks for.

Two kinds. Fresh noise in every round, with or without Poisson sampling: Opacus's accountants. A stream of correlated
noise: all its rounds together are *one* Gaussian mechanism of multiplier `sigma / sensitivity of C` (arXiv 2306.08153
section 2), whose privacy loss distribution dp-accounting has. Neighbours differ by one example added or removed.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

from gradguard.errors import InputError

#: A multiplier that no budget should need: the search ends there.
LARGEST_MULTIPLIER = 1e6


class Accountant(Protocol):
    """What a mechanism costs."""

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """`epsilon` at `delta` for a mechanism of this noise multiplier.

        Args:
            noise_multiplier: standard deviation over what one example can change; 0 costs infinity.
            delta: in (0, 1).

        Returns:
            Not negative, `inf` without noise.
        """


@dataclass(frozen=True, kw_only=True)
class OpacusAccountant:
    """Fresh noise in each round.

    Args:
        rounds: how many messages, at least 1. Without sampling: the rounds in which the example takes part.
        sample_rate: probability with which each example is in a round's batch, independently (Poisson sampling);
            `None`: no amplification is claimed. A shuffling loader does not sample so.
        kind: "rdp" or "prv" (tighter, slower).

    Raises:
        InputError: for a value out of its range.
    """

    rounds: int
    sample_rate: float | None = None
    kind: Literal["rdp", "prv"] = "rdp"

    def __post_init__(self) -> None:
        _require_rounds(rounds=self.rounds)
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise InputError(f"`sample_rate` must be in (0, 1], or None without Poisson sampling: {self.sample_rate}.")
        if self.kind not in ("rdp", "prv"):
            raise InputError(f'`kind` must be "rdp" or "prv", got {self.kind!r}.')

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """As `Accountant.epsilon`."""
        _require(noise_multiplier, delta)
        if noise_multiplier == 0:
            return math.inf
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism=self.kind)
        accountant.history = [(noise_multiplier, self.sample_rate or 1.0, self.rounds)]
        with warnings.catch_warnings():
            # It says that more orders could give a smaller epsilon; what it returns holds.
            warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
            return float(accountant.get_epsilon(delta=delta))


@dataclass(frozen=True, kw_only=True)
class StreamAccountant:
    """A stream of correlated noise, or any number of fresh rounds without sampling, as one Gaussian event.

    Args:
        sensitivity: of the matrix `C`: the largest norm of the sum of its columns at an example's rounds. For fresh
            noise the square root of the number of rounds that an example is in.

    Raises:
        InputError: unless it is positive and finite.
    """

    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sensitivity < math.inf:
            raise InputError(f"`sensitivity` must be positive and finite, got {self.sensitivity}.")

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """As `Accountant.epsilon`; `noise_multiplier` is that of the white noise over what one example can change."""
        _require(noise_multiplier, delta)
        if noise_multiplier == 0:
            return math.inf
        from dp_accounting.pld import privacy_loss_distribution

        single = noise_multiplier / self.sensitivity
        # A coarse grid where the loss is large, so that its table stays small; pessimistic either way.
        spread = 1 / single**2 + 1 / single
        loss = privacy_loss_distribution.from_gaussian_mechanism(
            single, value_discretization_interval=max(1e-4, 1e-4 * spread)
        )
        return float(loss.get_epsilon_for_delta(delta))


def epsilon(noise_multiplier: float, delta: float, *, accountant: Accountant) -> float:
    """What a mechanism costs.

    Args:
        noise_multiplier: standard deviation over what one example can change (add or remove), not negative.
        delta: in (0, 1).
        accountant: how the messages hang together.

    Returns:
        `epsilon`, `inf` without noise.
    """
    return accountant.epsilon(noise_multiplier, delta)


def noise_multiplier_for(epsilon: float, delta: float, *, accountant: Accountant, tolerance: float = 1e-3) -> float:
    """The least noise multiplier whose cost is at most `epsilon`, found by bisection.

    Args:
        epsilon: the budget, positive.
        delta: in (0, 1).
        accountant: how the messages hang together.
        tolerance: relative, of the multiplier; the one returned is on the safe side.

    Returns:
        The noise multiplier, positive.

    Raises:
        InputError: if the budget is no positive number, or no noise that the accountant can tell from another meets it.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"`epsilon` must be positive and finite, got {epsilon}.")
    _require(1.0, delta)
    high = 1.0
    while accountant.epsilon(high, delta) > epsilon:
        high *= 2
        if high > LARGEST_MULTIPLIER:
            raise InputError(f"No noise meets epsilon = {epsilon} at delta = {delta}. Allow more, or fewer rounds.")
    low = high / 2
    while low > 1e-3 and accountant.epsilon(low, delta) <= epsilon:
        low, high = low / 2, low
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if accountant.epsilon(middle, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _require(noise_multiplier: float, delta: float) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise InputError(f"`noise_multiplier` must be finite and not negative, got {noise_multiplier}.")
    if not 0 < delta < 1:
        raise InputError(f"`delta` must be in (0, 1), got {delta}.")


def _require_rounds(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
