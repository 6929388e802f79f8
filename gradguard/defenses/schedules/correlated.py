"""Noise that is correlated over rounds, so that what the model accumulates cancels.

Round `t` sends `g_t + std sum_j d_j w_{t-j}`, `w` white and `d` the first column of `C^{-1}` (`linalg.toeplitz`). At
equal accuracy the noise may then be some 10-16 dB larger than fresh noise. An attacker who sees the whole stream
multiplies it by `C` and faces `std / |C e_t|`, not what one message shows: that is what strengths mean here, and `gain`
is the ratio. Uses of one example closer than the filter's memory add up coherently.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradguard.defenses.laws.base import Law
from gradguard.defenses.release import Release
from gradguard.defenses.schedules.base import Filter, Schedule
from gradguard.defenses.stream import KEY_BYTES, MessageNoise, NoiseStream
from gradguard.errors import InputError
from gradguard.linalg import toeplitz
from gradguard.threats.knowledge import NoiseFilter, Unit


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

    def gain(self) -> float:
        """`|C e_0|`: the white noise over what an attacker who knows all other rounds faces in one message."""
        return float(np.linalg.norm(self.column()))

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

    Near the optimum for every curvature of the loss at once. It keeps no tensors: earlier noise is drawn again from the
    key, `bands` draws for each message.

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
        return SeedFilter(self, toeplitz.inverse_square_root(self._bands), _stream(stream, generator))


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
        return SeedFilter(self, np.array([1.0, -self.value]), _stream(stream, generator))


@dataclass(frozen=True, kw_only=True)
class TwoBuffers(Correlated):
    """A buffered linear Toeplitz matrix with two buffers (arXiv 2404.16706, 2408.08868): two tensors of memory.

    Its decays are those of least error times sensitivity for these rounds, separation and participations; a third
    buffer gains 0-1%. The best of all schedules in (epsilon, delta).

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
        return BufferFilter(self, *self.parameters(), _stream(stream, generator))


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


# ---------------------------------------------------------------------- at work


class StreamFilter(Filter):
    """What both filters share: the count of messages, learning rates, and what the receiver knows.

    Args:
        schedule: The options.
        stream: Of the secret noise.
    """

    def __init__(self, schedule: Correlated, stream: NoiseStream) -> None:
        self.schedule, self.stream = schedule, stream
        self._column = schedule.column()
        self._marginals = np.sqrt(np.cumsum(toeplitz.inverse(self._column, schedule.rounds) ** 2))
        self.gain = float(np.linalg.norm(self._column))
        #: Learning rates of the messages sent so far; `None` for all where none is given.
        self.rates: list[float | None] = []

    def source(self, release: Release) -> MessageNoise:
        """See `Filter.source`."""
        count = len(self.rates)
        if count >= self.schedule.rounds:
            raise InputError(
                f"This stream was made for {self.schedule.rounds} rounds, and they have been sent: more would be less "
                "protected than was asked for. Start a new one with a larger `rounds`."
            )
        rate = release.learning_rate
        if count and (rate is None) != (self.rates[0] is None):
            raise InputError("A stream goes by the learning rate in all rounds or in none: give it each time.")
        message = self.stream.message(device=release.device)
        self.rates.append(rate)
        return self._next(message, 1.0 if rate is None else rate)

    @abstractmethod
    def _next(self, message: MessageNoise, rate: float) -> MessageNoise:
        """The numbers of the next message, from its own white ones."""

    def withdraw(self) -> None:
        """See `Filter.withdraw`."""
        self.rates.pop()
        self._undo()

    @abstractmethod
    def _undo(self) -> None:
        """Take the last message out of the memory."""

    def marginal(self) -> float:
        """See `Filter.marginal`; at a constant learning rate."""
        return float(self._marginals[len(self.rates) - 1])

    def knowledge(self, std: float) -> NoiseFilter:
        """See `Filter.knowledge`."""
        rates = None if self.rates[0] is None else tuple(r for r in self.rates if r is not None)
        return NoiseFilter(
            column=torch.from_numpy(self._column), std=std, round=len(self.rates) - 1, learning_rates=rates
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Filter.state_dict`."""
        return {"rates": list(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Filter.load_state_dict`."""
        self.rates = list(state["rates"])


class SeedFilter(StreamFilter):
    """`n_t = sum_j d_j eta_{t-j} w_{t-j} / eta_t`, earlier `w` drawn again from the key.

    Args:
        schedule: The options.
        coefficients: `d`.
        stream: Of the secret noise.
    """

    def __init__(self, schedule: Correlated, coefficients: toeplitz.Column, stream: NoiseStream) -> None:
        super().__init__(schedule, stream)
        self.coefficients = [float(d) for d in coefficients]
        #: The stream's own number and the rate of each message sent, the last one last.
        self.sent: list[tuple[int, float]] = []

    def _next(self, message: MessageNoise, rate: float) -> MessageNoise:
        self.sent.append((message.round, rate))
        latest = self.sent[: -len(self.coefficients) - 1 : -1]
        terms = [(d * eta / rate, number) for d, (number, eta) in zip(self.coefficients, latest, strict=False)]
        return _Redrawn(self.stream, message, terms)

    def _undo(self) -> None:
        self.sent.pop()

    def state_dict(self) -> dict[str, Any]:
        """See `Filter.state_dict`."""
        return super().state_dict() | {"sent": self.sent[-len(self.coefficients) :]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Filter.load_state_dict`."""
        super().load_state_dict(state)
        self.sent = [(int(number), float(rate)) for number, rate in state["sent"]]


class BufferFilter(StreamFilter):
    """`x = eta_t w - sum omega_j buf_j`, `buf_j <- theta_j buf_j + x`, `n_t = x / eta_t` (arXiv 2408.08868, Alg. 3).

    Args:
        schedule: The options.
        theta: Decays.
        omega: Weights.
        stream: Of the secret noise.
    """

    def __init__(
        self, schedule: Correlated, theta: toeplitz.Column, omega: toeplitz.Column, stream: NoiseStream
    ) -> None:
        super().__init__(schedule, stream)
        self.theta, self.omega = [float(t) for t in theta], [float(w) for w in omega]
        #: By tensor and draw: the buffers.
        self.buffers: dict[tuple[str, int], list[Tensor]] = {}
        self._last: tuple[int, float, list[tuple[str, int]]] | None = None

    def _next(self, message: MessageNoise, rate: float) -> MessageNoise:
        drawn: list[tuple[str, int]] = []
        self._last = (message.round, rate, drawn)
        return _Buffered(self, message, rate, drawn)

    def _undo(self) -> None:
        if self._last is None:
            raise InputError("Only the last message can be taken back, and only once.")
        number, rate, drawn = self._last
        for name, draw in drawn:
            now = self.buffers[name, draw]
            white = self.stream.normal(number, name, tuple(now[0].shape), draw=draw).to(now[0])
            # The step solved backwards, so that nothing has to be kept for it.
            share = 1 - sum(w / t for w, t in zip(self.omega, self.theta, strict=True))
            known = sum(w / t * b for w, t, b in zip(self.omega, self.theta, now, strict=True))
            x = (rate * white - known) / share
            self.buffers[name, draw] = [(b - x) / t for b, t in zip(now, self.theta, strict=True)]
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        """See `Filter.state_dict`: the buffers tell nothing of the key, but they are noise that is still to cancel."""
        return super().state_dict() | {"buffers": {key: [b.clone() for b in bs] for key, bs in self.buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Filter.load_state_dict`."""
        super().load_state_dict(state)
        self.buffers = {key: [b.clone() for b in bs] for key, bs in state["buffers"].items()}
        self._last = None


class _Redrawn(MessageNoise):
    """A message's numbers as a sum of those of several rounds."""

    def __new__(cls, stream: NoiseStream, message: MessageNoise, terms: list) -> _Redrawn:
        return super().__new__(cls, stream, message.round, message.device)  # type: ignore[return-value]

    def __init__(self, stream: NoiseStream, message: MessageNoise, terms: list[tuple[float, int]]) -> None:
        super().__init__(stream, message.round, message.device)
        self._terms = terms

    def normal(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        draw = self._draws.get(name, 0)
        self._draws[name] = draw + 1
        total = torch.zeros(tuple(shape), dtype=torch.float64, device="cpu")
        for weight, number in self._terms:
            total.add_(self._stream.normal(number, name, shape, draw=draw), alpha=weight)
        return total


class _Buffered(MessageNoise):
    """A message's numbers from its white ones and the buffers, which then stand behind it."""

    def __new__(cls, filter: BufferFilter, message: MessageNoise, rate: float, drawn: list) -> _Buffered:
        return super().__new__(cls, filter.stream, message.round, message.device)  # type: ignore[return-value]

    def __init__(self, filter: BufferFilter, message: MessageNoise, rate: float, drawn: list[tuple[str, int]]) -> None:
        super().__init__(filter.stream, message.round, message.device)
        self._filter, self._rate, self._drawn = filter, rate, drawn

    def normal(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        draw = self._draws.get(name, 0)
        self._draws[name] = draw + 1
        own = self._filter
        x = self._stream.normal(self.round, name, shape, draw=draw).mul_(self._rate)
        buffers = own.buffers.get((name, draw))
        if buffers is None:
            buffers = [torch.zeros_like(x) for _ in own.theta]
            own.buffers[name, draw] = buffers
        for weight, buffer in zip(own.omega, buffers, strict=True):
            x.add_(buffer, alpha=-weight)
        for decay, buffer in zip(own.theta, buffers, strict=True):
            buffer.mul_(decay).add_(x)
        self._drawn.append((name, draw))
        return x.div_(self._rate)
