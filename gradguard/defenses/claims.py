"""What (epsilon, delta) may be claimed for a defense, or why none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradguard.defenses.base import Defense
from gradguard.defenses.clipping import ClipPerExample, ClipUpdate
from gradguard.defenses.compose import Compose
from gradguard.defenses.laws import Isotropic
from gradguard.defenses.noise import Noise
from gradguard.defenses.protector import Protector
from gradguard.defenses.schedules import Fresh
from gradguard.defenses.strengths import Epsilon, NoiseMultiplier
from gradguard.errors import InputError
from gradguard.privacy.accountants import Accountant, OpacusAccountant, StreamAccountant
from gradguard.threats.knowledge import Unit


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed.

    Args:
        epsilon: of the whole run; `None`: it is not differentially private.
        delta: that it is at.
        unit: whose: neighbours differ by one of these, added or removed.
        reason: why nothing is claimed; empty where something is.
    """

    epsilon: float | None
    delta: float
    unit: Unit = "example"
    reason: str = ""

    def __str__(self) -> str:
        if self.epsilon is None:
            return f"not differentially private: {self.reason}"
        return f"({self.epsilon:.3g}, {self.delta:g})-differentially private per {self.unit}, added or removed"


def claim(
    defense: Defense | Protector,
    *,
    delta: float,
    rounds: int,
    sample_rate: float | None = None,
    participations: int | None = None,
    stream_sensitivity: float | None = None,
    secure: bool = False,
) -> Claim:
    """What holds for a run of `rounds` messages.

    Args:
        defense: the options, or the running thing, which knows whether its noise is secret and secure.
        delta: in (0, 1).
        rounds: messages of the run.
        sample_rate: the probability of Poisson sampling, if the loader samples so.
        participations: in how many rounds an example is at most (default: all).
        stream_sensitivity: of correlated noise, relative, see `Epsilon`.
        secure: for options: that they are started with `secure=True` and no seed.

    Returns:
        The claim; `str(claim)` is the sentence for reports.

    Raises:
        InputError: for numbers out of their range.
    """
    if not 0 < delta < 1:
        raise InputError(f"`delta` must be in (0, 1), got {delta}.")
    if participations is not None and not 1 <= participations <= rounds:
        raise InputError(f"`participations` must be from 1 to `rounds` = {rounds}, got {participations}.")
    # Out-of-range numbers are refused whether or not a claim can be made.
    accountant: Accountant = OpacusAccountant(rounds=participations or rounds, sample_rate=sample_rate)
    if isinstance(defense, Protector):
        secure = defense.secret and bool(getattr(defense.stream, "secure", False))
        defense = defense.defense
    found = _clip_and_noise(defense)
    if isinstance(found, str):
        return Claim(epsilon=None, delta=delta, reason=found)
    clip, noise = found
    unit: Unit = "client" if isinstance(clip, ClipUpdate) else "example"
    reason = _obstacle(clip, noise, sample_rate, participations, stream_sensitivity, secure)
    if reason:
        return Claim(epsilon=None, delta=delta, unit=unit, reason=reason)
    strength = noise.strength
    assert isinstance(strength, NoiseMultiplier | Epsilon), "checked by `_obstacle`"
    multiplier = strength.value if isinstance(strength, NoiseMultiplier) else strength.noise_multiplier
    if stream_sensitivity is not None:
        accountant = StreamAccountant(sensitivity=stream_sensitivity)
    epsilon = accountant.epsilon(multiplier, delta)
    if math.isinf(epsilon):
        return Claim(epsilon=None, delta=delta, unit=unit, reason="there is no noise")
    return Claim(epsilon=epsilon, delta=delta, unit=unit)


def _clip_and_noise(defense: Defense) -> tuple[ClipPerExample | ClipUpdate, Noise] | str:
    """The two steps that a claim rests on, or what is missing."""
    steps = defense.steps if isinstance(defense, Compose) else (defense,)
    if not isinstance(steps[0], ClipPerExample | ClipUpdate):
        return "nothing bounds what one example can change (clip per example first)"
    if len(steps) < 2 or not isinstance(steps[1], Noise):
        return "no noise follows the clipping directly"
    if len(steps) > 2:
        # They may look at the batch again, which noise does not cover.
        return "steps after the noise are not accounted for"
    return steps[0], steps[1]


def _obstacle(
    clip: ClipPerExample | ClipUpdate,
    noise: Noise,
    sample_rate: float | None,
    participations: int | None,
    stream_sensitivity: float | None,
    secure: bool,
) -> str:
    fresh = isinstance(noise.schedule, Fresh)
    if isinstance(clip, ClipPerExample) and clip.quantile is not None:
        return "the clipping norm follows the data"
    if not isinstance(noise.law, Isotropic):
        return f"{noise.law.name} noise depends on the data or is smaller in some directions"
    if not isinstance(noise.strength, NoiseMultiplier | Epsilon):
        return f"{type(noise.strength).__name__} is not relative to what one example can change"
    if not fresh and stream_sensitivity is None:
        return f"the sensitivity of {noise.schedule.name} noise over the rounds is not given"
    if fresh and stream_sensitivity is not None:
        return "`stream_sensitivity` is of correlated noise, and this noise is fresh"
    if sample_rate is not None and (not fresh or participations is not None):
        return "sampling amplifies fresh noise over all rounds only"
    if sample_rate is not None and not (isinstance(clip, ClipPerExample) and clip.expected_batch_size):
        return "with Poisson sampling the batch's size is secret: set `expected_batch_size`"
    if not secure:
        return "the noise is not drawn with `secure=True` from a secret key"
    return ""
