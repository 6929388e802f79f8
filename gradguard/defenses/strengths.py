"""Strengths: how much noise. All say the standard deviation of one element that an attacker faces in one message.

"Faces" is the attacker who knows everything else: with noise that is correlated over rounds that is less than what one
message shows, and it is what a strength means here, so that the same strength protects a message equally under every
schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from gradguard.defenses.laws.base import Shape
from gradguard.defenses.release import Release
from gradguard.errors import InputError
from gradguard.leakage.floors import bayes_floor
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.privacy.accountants import OpacusAccountant, StreamAccountant, noise_multiplier_for

#: Steps of the search for the least noise that holds a floor; the last moves the noise by less than 0.1%.
SEARCH_STEPS = 24


def require_positive(**values: float) -> None:
    """Raises `InputError` for a strength that is not a positive, finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"`{name}` must be positive and finite, got {value}.")


@dataclass(frozen=True, kw_only=True)
class Strength(ABC):
    """Options of a strength. A subclass is a frozen, keyword-only dataclass that defines `std`."""

    @abstractmethod
    def std(self, release: Release, shape: Shape) -> float:
        """The noise's standard deviation on one element, in the mean over elements.

        Args:
            release: the message.
            shape: of the noise there.

        Returns:
            Gradient units, not negative.

        Raises:
            InputError: if the release lacks what the strength goes by.
        """


@dataclass(frozen=True, kw_only=True)
class Std(Strength):
    """A standard deviation.

    Args:
        value: Gradient units, 0 or larger; 0 is no noise.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`Std(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """The value itself."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Ratio(Strength):
    """The noise's norm relative to the message's, in expectation.

    It depends on the private gradient's norm: convenient for comparisons, no mechanism with a guarantee.

    Args:
        value: `|n| / |g|`, 0 or larger.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`Ratio(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """`value |g| / sqrt(P)`."""
        return self.value * release.norm / max(release.size, 1) ** 0.5


def one_strength(*, noise_ratio: float | None, std: float | None) -> Strength:
    """The strength of a recipe that takes either of two.

    Args:
        noise_ratio: As in `Ratio`, positive; or
        std: as in `Std`, positive.

    Returns:
        The strength.

    Raises:
        InputError: If not exactly one is given, or it is not positive and finite.
    """
    if std is None and noise_ratio is not None:
        require_positive(noise_ratio=noise_ratio)
        return Ratio(value=noise_ratio)
    if std is not None and noise_ratio is None:
        require_positive(std=std)
        return Std(value=std)
    raise InputError(f"Give exactly one of `noise_ratio` and `std`, got {noise_ratio} and {std}.")


@dataclass(frozen=True, kw_only=True)
class NoiseMultiplier(Strength):
    """Noise relative to the sensitivity: what one example can change the message by (clip over batch size).

    Args:
        value: 0 or larger.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise InputError(f"`NoiseMultiplier(value=...)` must be finite and not negative, got {self.value}.")

    def std(self, release: Release, shape: Shape) -> float:
        """`value` times the release's sensitivity."""
        if release.sensitivity is None:
            raise InputError(
                "A noise multiplier is relative to what one example can change the message by, and nothing bounds that "
                "here. Clip first: `Compose(steps=(ClipPerExample(max_norm=1), Noise(strength=NoiseMultiplier(...))))`."
            )
        return self.value * release.sensitivity


@dataclass(frozen=True, kw_only=True)
class Floor(Strength):
    """The least noise with which no attacker gets an example better than a floor, the most exposed one included.

    The floor is the Bayes floor of the linear-Gaussian model (`leakage.bayes_floor`), of an attacker who knows the
    prior, the defense, and all other examples. It depends on the private batch: no mechanism with a guarantee.

    Args:
        psnr: dB for inputs in a range of 1: what no attacker is to reach. It must lie above the prior's own.
        prior: What inputs look like: anything with `sqrt(x)`, `(N, *input_shape)`.
        others_known: The attacker knows the other examples of the batch; `False`: it must solve for all of them.

    Raises:
        InputError: If `psnr` is not finite.
    """

    psnr: float
    prior: PowerLawPrior = field(default_factory=PowerLawPrior)
    others_known: bool = True

    def __post_init__(self) -> None:
        if not -float("inf") < self.psnr < float("inf"):
            raise InputError(f"`Floor(psnr=...)` must be finite, got {self.psnr}.")

    def std(self, release: Release, shape: Shape) -> float:
        """Found by halving on a logarithmic scale, rounded up: the floor holds.

        Args:
            release: The message with its batch.
            shape: Of the noise; its covariance must be known before it is drawn.

        Returns:
            Gradient units.

        Raises:
            InputError: If no noise reaches the floor, or the law's covariance is not known before the draw.
        """
        if shape.knowledge(1.0).variance is None:
            raise InputError(
                "`Floor` has to know the noise's covariance before it is drawn, and this law's is known only after. "
                "Use the `Isotropic` law, or `Ratio` and read the floor from `leakage.bayes_floor`."
            )
        jacobian = release.jacobian if self.others_known else release.jacobian.joint()

        def reached(std: float) -> float:
            found = bayes_floor(
                jacobian,
                self.prior,
                variance=shape.knowledge(std).variance,
                generator=torch.Generator().manual_seed(0),  # of the trace's probes: the same for every trial
            )
            assert found.prior_psnr is not None
            if found.prior_psnr.max() > self.psnr:
                raise InputError(
                    f"No noise keeps an attacker below {self.psnr:g} dB: the prior alone, without any gradient, gets "
                    f"{found.prior_psnr.max():.2f} dB. Ask for a higher floor, or give the prior that is meant."
                )
            return float(found.psnr.max())

        high = max(release.norm, torch.finfo(torch.float32).tiny)
        while reached(high) > self.psnr:
            high *= 32
        low = high
        while reached(low) <= self.psnr:
            high, low = low, low / 32
            if low < high * 1e-30 or low < 1e-30:
                return low  # even no noise at all holds it
        for _ in range(SEARCH_STEPS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if reached(middle) > self.psnr else (low, middle)
            if high / low < 1.001:
                break
        return high


@dataclass(frozen=True, kw_only=True)
class Epsilon(Strength):
    """The least Gaussian noise that meets (epsilon, delta) over all rounds; examples added or removed are neighbours.

    The number is a promise only under the conditions that `gradguard.defenses.claim` checks.

    Args:
        epsilon: The budget of the whole run, positive.
        delta: In (0, 1), well below 1 over the number of examples.
        rounds: Messages of the run.
        sample_rate: With Poisson sampling, the probability with which an example is in a batch; `None`: none is
            claimed.
        participations: In how many rounds one example is at most (default: all); not with `sample_rate`.
        stream_sensitivity: For correlated noise: the sensitivity of `C` relative to its first column,
            `sens(C) / |C e_0|`, for the run's rounds, separation and participations. A number, or a function of
            `(rounds, participations)`.

    Raises:
        InputError: If an argument is outside its range, or two exclude each other.
    """

    epsilon: float
    delta: float
    rounds: int
    sample_rate: float | None = None
    participations: int | None = None
    stream_sensitivity: float | Callable[[int, int], float] | None = None

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon)
        if not 0 < self.delta < 1:
            raise InputError(f"`delta` must be in (0, 1), got {self.delta}.")
        if self.sample_rate is not None and (self.participations, self.stream_sensitivity) != (None, None):
            raise InputError(
                "Sampling amplifies fresh noise over all rounds; with `participations` or `stream_sensitivity` nothing "
                "is amplified. Give `sample_rate`, or those."
            )
        if self.participations is not None and not 1 <= self.participations <= self.rounds:
            raise InputError(f"`participations` must be from 1 to `rounds` = {self.rounds}: {self.participations}.")
        _ = self.accountant

    @property
    def accountant(self) -> OpacusAccountant | StreamAccountant:
        """What counts the cost."""
        if self.stream_sensitivity is None:
            return OpacusAccountant(rounds=self.participations or self.rounds, sample_rate=self.sample_rate)
        given = self.stream_sensitivity
        return StreamAccountant(
            sensitivity=given(self.rounds, self.participations or self.rounds) if callable(given) else given
        )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation over sensitivity."""
        return _multiplier(self.epsilon, self.delta, self.accountant)

    def std(self, release: Release, shape: Shape) -> float:
        """The noise multiplier times the release's sensitivity."""
        return NoiseMultiplier(value=self.noise_multiplier).std(release, shape)


@lru_cache(maxsize=256)
def _multiplier(epsilon: float, delta: float, accountant: OpacusAccountant | StreamAccountant) -> float:
    return noise_multiplier_for(epsilon, delta, accountant=accountant)
