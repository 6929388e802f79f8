"""Totals over rounds: which example has been in how many messages, and when a budget is spent."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from gradguard.errors import InputError
from gradguard.privacy.accountants import OpacusAccountant, _require
from gradguard.threats.knowledge import Unit


class BudgetExhaustedError(InputError):
    """Another message would cost an example or a client more than its budget."""


class PrivacyLedger:
    """Counts the participations of each example (or client) and what they cost, for fresh Gaussian noise.

    Without amplification by sampling: that an example was in a round is taken as known.

    Args:
        noise_multiplier: of each message, positive: standard deviation over sensitivity.
        delta: in (0, 1).
        budget: the largest epsilon that a unit may spend; `None`: it is only counted.
        unit: whose privacy it is.

    Raises:
        InputError: for a value out of its range.
    """

    def __init__(
        self, *, noise_multiplier: float, delta: float, budget: float | None = None, unit: Unit = "example"
    ) -> None:
        _require(noise_multiplier, delta)
        if budget is not None and not budget > 0:
            raise InputError(f"`budget` must be positive, or None, got {budget}.")
        if unit not in ("example", "client"):
            raise InputError(f'`unit` must be "example" or "client", got {unit!r}.')
        self.noise_multiplier, self.delta, self.budget, self.unit = noise_multiplier, delta, budget, unit
        self.participations: dict[Hashable, int] = {}
        self._costs: dict[int, float] = {0: 0.0}

    def record(self, ids: Iterable[Hashable]) -> None:
        """Count a message, before it is sent. All or nothing.

        Args:
            ids: the units that are in it, strings or whole numbers; one that is there twice counts twice.

        Raises:
            BudgetExhaustedError: if one of them would spend more than the budget; nothing is then counted.
            InputError: for an id that is neither a string nor a whole number.
        """
        counts = dict(self.participations)
        for name in ids:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise InputError(f"Ids must be strings or whole numbers, so that they can be saved: got {name!r}.")
            counts[name] = counts.get(name, 0) + 1
        over = [n for n, c in counts.items() if c != self.participations.get(n, 0) and self._is_over(c)]
        if over:
            raise BudgetExhaustedError(
                f"The message would cost {len(over)} {self.unit}(s), {over[0]!r} among them, more than "
                f"epsilon = {self.budget} at delta = {self.delta}. Leave them out of the batch, or stop here."
            )
        self.participations = counts

    def epsilon(self, name: Hashable) -> float:
        """What a unit has spent.

        Args:
            name: its id; one that was in no message has spent nothing.

        Returns:
            `epsilon` at the ledger's delta.
        """
        return self._cost(self.participations.get(name, 0))

    @property
    def worst(self) -> float:
        """The largest epsilon that any unit has spent: what may be said of all."""
        return self._cost(max(self.participations.values(), default=0))

    def exhausted(self, ids: Iterable[Hashable]) -> list[Hashable]:
        """Those that may not take part again.

        Args:
            ids: candidates.

        Returns:
            Those of them whose next message would pass the budget.
        """
        return [n for n in ids if self._is_over(self.participations.get(n, 0) + 1)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types.

        Returns:
            What `from_dict` takes. Ids are private: store it as you store the data.
        """
        return {
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "budget": self.budget,
            "unit": self.unit,
            "participations": [[n, c] for n, c in self.participations.items()],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PrivacyLedger:
        """A ledger that goes on where `state` was taken.

        Args:
            state: of `to_dict`, through JSON or not.

        Returns:
            The ledger.

        Raises:
            InputError: for what is no such state.
        """
        try:
            options = {n: state[n] for n in ("noise_multiplier", "delta", "budget", "unit")}
            counts = {n: int(c) for n, c in state["participations"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is no saved PrivacyLedger: {error!r}.") from error
        if any(c < 0 for c in counts.values()):
            raise InputError("This is no saved PrivacyLedger: a number of participations is negative.")
        ledger = cls(**options)
        ledger.participations = counts
        return ledger

    def _is_over(self, count: int) -> bool:
        return self.budget is not None and self._cost(count) > self.budget

    def _cost(self, count: int) -> float:
        if count not in self._costs:
            accountant = OpacusAccountant(rounds=count)
            self._costs[count] = accountant.epsilon(self.noise_multiplier, self.delta)
        return self._costs[count]
