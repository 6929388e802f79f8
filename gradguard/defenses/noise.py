"""Noise: a law in space x a schedule over rounds x a strength."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gradguard.defenses.base import Defense
from gradguard.defenses.coverage import Covered, cover_message
from gradguard.defenses.laws import Isotropic, Law
from gradguard.defenses.protector import Protector
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.schedules import Fresh, Schedule
from gradguard.defenses.stream import NoiseStream, fresh_noise
from gradguard.defenses.strengths import Ratio, Strength
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add, norm
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Noise(Defense):
    """Add noise: `law` says where, `schedule` how messages hang together, `strength` how much.

    Args:
        law: Where noise goes. Default: the same on every element.
        schedule: Over rounds. Default: new noise for every message.
        strength: How much.

    Raises:
        InputError: If the schedule cannot be used with the law.
    """

    law: Law = field(default_factory=Isotropic)
    schedule: Schedule = field(default_factory=Fresh)
    strength: Strength = field(default_factory=lambda: Ratio(value=0.5))

    def __post_init__(self) -> None:
        for name, kind in (("law", Law), ("schedule", Schedule), ("strength", Strength)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(
                    f"`{name}` must be a gradguard.defenses {kind.__name__}, got {type(getattr(self, name)).__name__}."
                )
        self.schedule.check(self.law)

    @property
    def needs_jacobian(self) -> bool:  # type: ignore[override]
        """Whether the law does."""
        return self.law.needs_jacobian

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """Noise for one message alone; a schedule with a memory is refused."""
        if self.schedule.stateful:
            raise InputError(
                f"{self.schedule.name} noise hangs together over messages, so a single call cannot draw it. Start it: "
                "`protector = defense.start()`, and `protector.protect(release)` for each message."
            )
        release = Release(gradient) if jacobian is None else Release.of(jacobian, gradient)
        source = fresh_noise(release.device) if generator is None else generator
        shape = self.law.prepare(release)
        std = self.strength.std(release, shape)
        return shape.draw(source, std)

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """The law's covariance at the size that the message differs by.

        Args:
            release: What was protected.
            message: What is sent.

        Returns:
            The declaration.
        """
        std = norm(add(message, release.gradient, -1.0)).item() / max(release.size, 1) ** 0.5
        shape = self.law.prepare(release)
        if self.law.needs_jacobian and std > 0:
            shape.draw(fresh_noise(release.device), std)  # a law in the range knows its factor after a draw
        return shape.knowledge(std)

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> NoiseProtector:
        return NoiseProtector(self, stream, generator=generator)


class NoiseProtector(Protector):
    """`Noise` at work: the schedule's filter, and the noise of message after message."""

    defense: Noise

    def _begin(self) -> None:
        self.filter = self.defense.schedule.start(self.stream, self.generator)
        #: The strength that a stream keeps, that of its first message; `None` before it, and where messages are apart.
        self.held: float | None = None

    def _protect(self, release: Release) -> Sent:
        shape = self.defense.law.prepare(release)
        std = self.defense.strength.std(release, shape) if self.held is None else self.held
        white = std * self.filter.gain
        source = self.filter.source(release)
        try:
            delta = shape.draw(source, white)
            covered = Covered(message=add(release.gradient, delta))
            if std > 0 and not self.defense.law.covers:
                covered = cover_message(self.defense, release.gradient, covered.message, self.uncovered, source)
        except BaseException:
            self.filter.withdraw()  # nothing leaves, so the filter does not stand behind it
            raise
        if self.defense.schedule.stateful:
            self.held = std  # noise of another size would not cancel what was added before
        shown = white * self.filter.marginal()
        length = norm(delta).item()
        return Sent(
            message=covered.message,
            bare=covered.bare,
            sensitivity=release.sensitivity,
            knowledge=_declared(shape.knowledge(shown), self, white),
            cost={"std": std, "shown_std": shown, "noise_ratio": length / max(release.norm, 1e-300)},
        )

    def _withdraw(self) -> None:
        self.filter.withdraw()

    def state_dict(self) -> dict[str, Any]:
        """As `Protector.state_dict`, with the filter's memory."""
        return super().state_dict() | {"filter": self.filter.state_dict(), "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Protector.load_state_dict`, with the filter's memory."""
        super().load_state_dict(state)
        self.filter.load_state_dict(state["filter"])
        self.held = state["held"]


def _declared(knowledge: Knowledge, protector: NoiseProtector, white: float) -> Knowledge:
    return replace(knowledge, filter=protector.filter.knowledge(white), secret=protector.secret)
