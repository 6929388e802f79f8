"""Noise that is correlated over rounds, so that what the model accumulates cancels.

Round `t` sends `g_t + std sum_j d_j w_{t-j}`, `w` white and `d` the first column of `C^{-1}` (`linalg.toeplitz`). An
attacker who sees the whole stream multiplies it by `C` and faces `std / |C e_t|`, not what one message shows: that is
what strengths mean here, and the filter's `gain` is the ratio. Uses of one example closer than the filter's memory add
up coherently.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from gradguard.defenses.laws.base import Law
from gradguard.defenses.schedules.base import Filter, Schedule
from gradguard.defenses.schedules.filters import BufferFilter, SeedFilter
from gradguard.defenses.stream import KEY_BYTES, NoiseStream
from gradguard.errors import InputError
from gradguard.linalg import toeplitz
from gradguard.threats.knowledge import Unit


@dataclass(frozen=True, kw_only=True)
class Correlated(Schedule):
    """The frame: a subclass says the filter. What is asked for is never assumed: rounds, separation, unit.

    Args:
        rounds: Messages of the whole stream, at least 1.
        separation: Rounds from one use of an example (or client) to its next, at least 1: the epoch's length, with a
            loader that keeps the order. The filter's memory may not be longer.
        unit: Whose data is protected: "example" or "client". A client that takes part in every round has a separation
            of 1, and gains nothing.

    Raises:
        InputError: If a number is outside its range, or the memory is longer than the separation.
    """

    rounds: int
    separation: int
    unit: Unit = "example"

    def __post_init__(self) -> None:
        toeplitz.most_participations(self.rounds, self.separation)
        if self.unit not in ("example", "client"):
            raise InputError(f'`unit` must be "example" or "client", got {self.unit!r}.')
        if self.separation == 1 and self.rounds > 1:
            warnings.warn(
                f"With a separation of 1 every {self.unit} takes part in every round: correlation over rounds gains "
                "nothing then. Use fresh noise, or a loader that keeps uses apart.",
                stacklevel=3,
            )

    def check(self, law: Law) -> None:
        """Raise `InputError` for a law that is another in each round."""
        if not law.fixed:
            raise InputError(
                f"{law.name} noise is another in each round, so it cannot be correlated: the next message would show "
                "this one's noise outside of its own range. Correlate isotropic noise and add the other fresh: "
                "`Compose(steps=(Noise(schedule=...), Noise(law=...)))`."
            )

    @abstractmethod
    def column(self) -> toeplitz.Column:
        """The first column of `C`, shape `(rounds,)`, float64."""

    def _check_memory(self, bands: int, name: str) -> None:
        if bands < 1:
            raise InputError(f"`{name}` must be at least 1, got {bands}.")
        if bands > max(self.separation, 1) and self.rounds > self.separation:
            raise InputError(
                f"A memory of {bands} rounds is longer than the {self.separation} rounds between two uses, which would "
                f"then add up coherently. Use `{name}={self.separation}` at most."
            )


@dataclass(frozen=True, kw_only=True)
class SquareRoot(Correlated):
    """`d` the first `bands` coefficients of `(1 - z)^{1/2}`: 1, -1/2, -1/8, -1/16 (arXiv 2505.12128).

    It keeps no tensors: earlier noise is drawn again from the key, `bands` draws for each message.

    Args:
        rounds: As in `Correlated`.
        separation: The same.
        unit: The same.
        bands: Rounds of memory; default: 64, or as many as the separation allows.

    Raises:
        InputError: As in `Correlated`.
    """

    bands: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bands is None:
            object.__setattr__(self, "bands", min(64, self.separation, self.rounds))
        self._check_memory(self._bands, "bands")

    @property
    def _bands(self) -> int:
        assert self.bands is not None  # set above
        return self.bands

    def column(self) -> toeplitz.Column:
        """The inverse of the cut root."""
        return toeplitz.inverse(toeplitz.inverse_square_root(self._bands), self.rounds)

    def start(self, stream: NoiseStream, generator: torch.Generator | None = None) -> Filter:
        """From seeds."""
        return SeedFilter(self.column(), toeplitz.inverse_square_root(self._bands), _stream(stream, generator))


@dataclass(frozen=True, kw_only=True)
class Lambda(Correlated):
    """`n_t = w_t - value w_{t-1}` (arXiv 2601.22334): the shortest memory, one seed.

    Args:
        rounds: As in `Correlated`.
        separation: The same.
        unit: The same.
        value: In [0, 1).

    Raises:
        InputError: As in `Correlated`, and for a `value` outside its range.
    """

    value: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.value < 1:
            raise InputError(f"`value` must be in [0, 1), got {self.value}.")

    def column(self) -> toeplitz.Column:
        """Powers of `value`."""
        return self.value ** np.arange(self.rounds, dtype=float)

    def start(self, stream: NoiseStream, generator: torch.Generator | None = None) -> Filter:
        """From seeds."""
        return SeedFilter(self.column(), np.array([1.0, -self.value]), _stream(stream, generator))


@dataclass(frozen=True, kw_only=True)
class TwoBuffers(Correlated):
    """A buffered linear Toeplitz matrix with two buffers (arXiv 2404.16706, 2408.08868): two tensors of memory.

    Its decays are those of least error times sensitivity for these rounds, separation and participations.

    Args:
        rounds: As in `Correlated`.
        separation: The same.
        unit: The same.
        participations: Uses of an example at most; default: as many as fit.
        error: What of the prefix sums' errors is made least: their "mean" or their "max".

    Raises:
        InputError: As in `Correlated`.
    """

    participations: int | None = None
    error: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error not in ("mean", "max"):
            raise InputError(f'`error` must be "mean" or "max", got {self.error!r}.')

    def parameters(self) -> tuple[toeplitz.Column, toeplitz.Column]:
        """`theta` and `omega`, shape `(2,)` each; found once for each set of options."""
        return _two_buffers(self.rounds, self.separation, self.participations, self.error)

    def column(self) -> toeplitz.Column:
        """`1`, then sums of two geometric series."""
        return toeplitz.buffered(*self.parameters(), self.rounds)

    def start(self, stream: NoiseStream, generator: torch.Generator | None = None) -> Filter:
        """With two buffers for each tensor."""
        return BufferFilter(self.column(), *self.parameters(), _stream(stream, generator))


@lru_cache(maxsize=64)
def _two_buffers(
    rounds: int, separation: int, participations: int | None, error: str
) -> tuple[toeplitz.Column, toeplitz.Column]:
    return toeplitz.optimised_buffers(rounds, separation=separation, participations=participations, error=error)


def _stream(stream: NoiseStream, generator: torch.Generator | None) -> NoiseStream:
    """A seeded generator's stand-in for the key: earlier rounds must be drawn again."""
    if generator is None:
        return stream
    seed = torch.randint(256, (KEY_BYTES,), generator=generator, device=generator.device)
    return NoiseStream(bytes(seed.tolist()), secure=stream.secure)
