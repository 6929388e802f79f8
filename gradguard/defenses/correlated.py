"""Recipe: noise that is correlated over rounds, by the name that people look for."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.defenses.noise import Noise
from gradguard.defenses.recipe import Recipe
from gradguard.defenses.schedules.correlated import Correlated, TwoBuffers
from gradguard.defenses.strengths import one_strength
from gradguard.errors import InputError
from gradguard.threats.knowledge import Unit


@dataclass(frozen=True, kw_only=True)
class CorrelatedNoise(Recipe):
    """Isotropic noise that cancels in what the model accumulates: the same protection of a message at less price.

    It has to be started (`defense.start()`), since a message's noise hangs together with that of the ones before.

    Args:
        std: What an attacker who knows all other rounds faces in each element of one message, gradient units, positive.
        noise_ratio: The same relative to each message, `|n| / |g|`, positive; convenient for comparisons. Give one.
        rounds: Messages of the whole stream.
        separation: Rounds from one use of an example to its next.
        unit: "example" or "client".
        schedule: Another filter; `rounds`, `separation` and `unit` are then its own, and not given here.

    Raises:
        InputError: If not exactly one strength is given, or the stream is described twice or not at all.
    """

    std: float | None = None
    noise_ratio: float | None = None
    rounds: int | None = None
    separation: int | None = None
    unit: Unit = "example"
    schedule: Correlated | None = None

    def __post_init__(self) -> None:
        one_strength(noise_ratio=self.noise_ratio, std=self.std)
        described = self.rounds is not None and self.separation is not None
        if described == (self.schedule is not None):
            raise InputError(
                "Say how long the stream is and how far apart an example's uses are: `rounds=` and `separation=` (the "
                "rounds of an epoch, with a loader that keeps the order), or give a `schedule`."
            )
        self.made_of()

    def made_of(self) -> Noise:
        """Isotropic noise on the schedule."""
        schedule = self.schedule
        if schedule is None:
            assert self.rounds is not None
            assert self.separation is not None
            schedule = TwoBuffers(rounds=self.rounds, separation=self.separation, unit=self.unit)
        return Noise(schedule=schedule, strength=one_strength(noise_ratio=self.noise_ratio, std=self.std))
