"""Correlated schedules at work: where a message's numbers come from, and what it takes to take one back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradguard.defenses.release import Release
from gradguard.defenses.schedules.base import Filter
from gradguard.defenses.stream import MessageNoise, NoiseStream
from gradguard.errors import InputError
from gradguard.linalg import toeplitz
from gradguard.threats.knowledge import NoiseFilter


class StreamFilter(Filter):
    """What both filters share: the count of messages, learning rates, and what the receiver knows.

    Args:
        column: The first column of `C`, one entry for each round of the stream.
        stream: Of the secret noise.
    """

    def __init__(self, column: toeplitz.Column, stream: NoiseStream) -> None:
        self.stream, self._column = stream, column
        self._marginals = np.sqrt(np.cumsum(toeplitz.inverse(column, len(column)) ** 2))
        self.gain = float(np.linalg.norm(column))
        #: Learning rates of the messages sent so far; `None` for all where none is given.
        self.rates: list[float | None] = []

    def source(self, release: Release) -> MessageNoise:
        """See `Filter.source`."""
        count = len(self.rates)
        if count >= len(self._column):
            raise InputError(
                f"This stream was made for {len(self._column)} rounds, and they have been sent: more would be less "
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
        column: As in `StreamFilter`.
        coefficients: `d`.
        stream: Of the secret noise.
    """

    def __init__(self, column: toeplitz.Column, coefficients: toeplitz.Column, stream: NoiseStream) -> None:
        super().__init__(column, stream)
        self.coefficients = [float(d) for d in coefficients]
        #: The stream's own number and the rate of each message sent, the last one last.
        self.sent: list[tuple[int, float]] = []

    def _next(self, message: MessageNoise, rate: float) -> MessageNoise:
        self.sent.append((message.round, rate))
        latest = self.sent[: -len(self.coefficients) - 1 : -1]
        terms = [(d * eta / rate, number) for d, (number, eta) in zip(self.coefficients, latest, strict=False)]

        def numbers(name: str, shape: tuple[int, ...] | torch.Size, draw: int) -> Tensor:
            total = torch.zeros(tuple(shape), dtype=torch.float64, device="cpu")
            for weight, number in terms:
                total.add_(self.stream.normal(number, name, shape, draw=draw), alpha=weight)
            return total

        return MessageNoise(self.stream, message.round, message.device, numbers)

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
        column: As in `StreamFilter`.
        theta: Decays.
        omega: Weights.
        stream: Of the secret noise.
    """

    def __init__(
        self, column: toeplitz.Column, theta: toeplitz.Column, omega: toeplitz.Column, stream: NoiseStream
    ) -> None:
        super().__init__(column, stream)
        self.theta, self.omega = [float(t) for t in theta], [float(w) for w in omega]
        #: By tensor and draw: the buffers.
        self.buffers: dict[tuple[str, int], list[Tensor]] = {}
        self._last: tuple[int, float, list[tuple[str, int]]] | None = None

    def _next(self, message: MessageNoise, rate: float) -> MessageNoise:
        drawn: list[tuple[str, int]] = []
        self._last = (message.round, rate, drawn)

        def numbers(name: str, shape: tuple[int, ...] | torch.Size, draw: int) -> Tensor:
            x = self.stream.normal(message.round, name, shape, draw=draw).mul_(rate)
            if (name, draw) not in self.buffers:
                self.buffers[name, draw] = [torch.zeros_like(x) for _ in self.theta]
            buffers = self.buffers[name, draw]
            for weight, buffer in zip(self.omega, buffers, strict=True):
                x.add_(buffer, alpha=-weight)
            for decay, buffer in zip(self.theta, buffers, strict=True):
                buffer.mul_(decay).add_(x)
            drawn.append((name, draw))
            return x.div_(rate)

        return MessageNoise(self.stream, message.round, message.device, numbers)

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
