"""Several steps on one message: clip, then noise; prune, then quantise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradguard.defenses.base import Defense
from gradguard.defenses.protector import Protector
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.stream import NoiseStream
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add
from gradguard.threats.knowledge import NOTHING_DONE


@dataclass(frozen=True, kw_only=True)
class Compose(Defense):
    """One defense after the other, each on what the one before makes of the message.

    Args:
        steps: At least one, in order.

    Raises:
        InputError: If there is none, or something in it is no defense.
    """

    steps: tuple[Defense, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps) if isinstance(self.steps, Sequence) else (self.steps,))
        if not self.steps:
            raise InputError("`Compose(steps=...)` needs at least one defense.")
        for step in self.steps:
            if not isinstance(step, Defense):
                raise InputError(f"`Compose(steps=...)` takes defenses, got {type(step).__name__}.")

    @property
    def needs_jacobian(self) -> bool:  # type: ignore[override]
        """Whether a step does."""
        return any(step.needs_jacobian for step in self.steps)

    @property
    def random(self) -> bool:  # type: ignore[override]
        """Whether a step draws secret noise."""
        return any(step.random for step in self.steps)

    @property
    def name(self) -> str:
        """The steps' names."""
        return " + ".join(step.name for step in self.steps)

    def perturbation(self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator=None) -> Gradient:
        """The difference that all steps make; a step with a memory over rounds is refused."""
        release = Release(gradient) if jacobian is None else Release.of(jacobian, gradient)
        message = self._protector(NoiseStream(), generator).protect(release).message
        return add(message, gradient, -1.0)

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> Protector:
        return ComposeProtector(self, stream, generator=generator)


class ComposeProtector(Protector):
    """`Compose` at work: one protector for each step, their streams being independent."""

    defense: Compose

    def _begin(self) -> None:
        # One stream for each step: two that draw from one would use one address twice, or share a counter of rounds.
        self.steps = [
            step._protector(self.stream.part(str(index)), self.generator)
            for index, step in enumerate(self.defense.steps)
        ]

    def _protect(self, release: Release) -> Sent:
        now, knowledge = release, NOTHING_DONE
        cost: dict[str, float] = {}
        bare: list[str] = []
        done: list[Protector] = []
        try:
            for step in self.steps:
                sent = step.protect(now)
                done.append(step)
                knowledge = knowledge.then(sent.knowledge)
                cost |= sent.cost
                bare += sent.bare
                now = now.with_gradient(sent.message, sensitivity=sent.sensitivity)
        except Exception:
            for step in done:
                step.withdraw()
            raise
        return Sent(
            message=now.gradient,
            knowledge=replace(knowledge, secret=self.secret),
            cost=cost,
            bare=tuple(dict.fromkeys(bare)),
            sensitivity=now.sensitivity,
        )

    def _withdraw(self) -> None:
        for step in self.steps:
            step.withdraw()

    def state_dict(self) -> dict[str, Any]:
        """As `Protector.state_dict`, of every step."""
        return super().state_dict() | {"steps": [step.state_dict() for step in self.steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Protector.load_state_dict`, of every step."""
        super().load_state_dict(state)
        for step, own in zip(self.steps, state["steps"], strict=True):
            step.load_state_dict(own)
