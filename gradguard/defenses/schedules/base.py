"""Schedules over rounds: how the noise of one message hangs together with that of the others.

A schedule decides where a law's standard normal numbers come from: each message's own (fresh), an example's own
(permanent), or a filter of the numbers of earlier rounds, so that what the model accumulates cancels (correlated).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from gradguard.defenses.laws.base import Law
from gradguard.defenses.release import Release
from gradguard.defenses.stream import NoiseStream
from gradguard.threats.knowledge import NoiseFilter


class Filter(ABC):
    """A schedule at work on one stream. `source` and `withdraw` alternate as messages are made and taken back."""

    #: How many times larger the white noise is than what the attacker who knows all other rounds faces in one message:
    #: `|C e_0|` of a correlated stream. Strengths say the latter, so that schedules compare at the same protection.
    gain: float = 1.0

    @abstractmethod
    def source(self, release: Release) -> torch.Generator:
        """Where the next message's standard normal numbers come from; the filter then stands behind that message.

        Args:
            release: the message.

        Returns:
            A `MessageNoise`, or a seeded generator.

        Raises:
            InputError: if the release lacks what the schedule goes by (ids, a learning rate).
        """

    def withdraw(self) -> None:
        """The last message was not sent: the memory is what it was before it. Its numbers are never drawn again."""

    def knowledge(self, std: float) -> NoiseFilter | None:
        """What the receiver knows of the last message's place in the stream.

        Args:
            std: of the white noise, gradient units.

        Returns:
            The filter, or `None` where messages are independent.
        """
        return None

    def marginal(self) -> float:
        """The standard deviation of the last message's numbers, where the white ones have 1."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """The memory, without any key: plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Options of a schedule. A subclass is a frozen, keyword-only dataclass that defines `start`."""

    #: Whether a message depends on earlier ones or on ids, so that a defense with it has to be started.
    stateful: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The schedule's name in tables."""
        return type(self).__name__

    def check(self, law: Law) -> None:
        """Raise `InputError` for a law that this schedule cannot be used with."""

    @abstractmethod
    def start(self, stream: NoiseStream, generator: torch.Generator | None = None) -> Filter:
        """The schedule at work.

        Args:
            stream: of the secret noise.
            generator: a seeded generator in its place, for tests.

        Returns:
            The running thing.
        """
