"""A defense at work on one client's messages: the noise stream, the memory over rounds, and taking one back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradguard.defenses.coverage import Uncovered, cover
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.stream import NoiseStream
from gradguard.errors import InputError
from gradguard.functional.vectors import norm

if TYPE_CHECKING:
    from gradguard.defenses.base import Defense


class Protector:
    """Protects the messages of one sender, one after the other. `Defense.start` makes it.

    `protect` is called once for each message. One that does not leave after all (a guard blocks it) is taken back with
    `withdraw`, so that the filter of a correlated stream does not advance; its noise is never drawn again.

    Args:
        defense: the options.
        stream: of the secret noise.
        generator: a seeded generator in its place, for tests and benchmarks.
        uncovered: what becomes of tensors that the defense leaves bare, see `gradguard.defenses.coverage`.
    """

    def __init__(
        self,
        defense: Defense,
        stream: NoiseStream | None = None,
        *,
        generator: torch.Generator | None = None,
        uncovered: Uncovered = "noise",
    ) -> None:
        self.defense = defense
        self.uncovered: Uncovered = uncovered
        self.stream = stream if stream is not None else NoiseStream()
        self.generator = generator
        #: Messages that were protected and not withdrawn.
        self.rounds = 0
        self._begin()

    @property
    def secret(self) -> bool:
        """Whether the noise comes from a secret key, not from a seed."""
        return self.generator is None

    def protect(self, release: Release) -> Sent:
        """What to send in the place of `release`.

        Args:
            release: the message with its batch.

        Returns:
            The message and what its receiver knows of it.

        Raises:
            InputError: if the defense cannot work on this release; nothing has then been drawn for good.
        """
        sent = self._protect(release)
        self.rounds += 1
        return sent

    def withdraw(self) -> None:
        """The last message was not sent: the state over rounds is what it was before it."""
        if self.rounds == 0:
            raise InputError("Nothing was protected, so there is nothing to withdraw.")
        self._withdraw()
        self.rounds -= 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on, without the key: rounds, and the filter's memory where there is one.

        Returns:
            Plain types and tensors. The key stays with its owner (`Defense.start(key=...)`): without it a resumed
            training begins a new stream.
        """
        return {
            "rounds": self.rounds,
            "next": self.stream.round,
            "run": self.stream.run.hex(),
            "stream": self.stream.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Only once: two that go on from one state would send the same noise.

        Args:
            state: of a protector of the same defense.

        Raises:
            InputError: if it is of another key: the memory of a filter belongs to its key.
        """
        stream = self.stream.at(bytes.fromhex(state["run"]), int(state["next"]))
        if state["stream"] != stream.fingerprint:
            raise InputError(
                "The state is of another noise stream, so its filter cannot be continued. Start the defense with the "
                "same `key`, or leave the state out: a new stream then begins."
            )
        self.rounds, self.stream = int(state["rounds"]), stream
        self._begin()

    # ------------------------------------------------------------------ for subclasses

    def _protect(self, release: Release) -> Sent:
        """The work itself. Default: the defense's perturbation, drawn from the stream's next message."""
        source = self.generator if self.generator is not None else self.stream.message(device=release.device)
        return protected_once(self.defense, release, source, uncovered=self.uncovered)

    def _begin(self) -> None:
        """Make what hangs on `stream`, at its beginning: called for each stream, new or resumed. Default: nothing."""

    def _withdraw(self) -> None:
        """Undo what `_protect` did to the state over rounds. Default: there is none."""


def protected_once(
    defense: Defense, release: Release, source: torch.Generator, *, uncovered: Uncovered = "noise"
) -> Sent:
    """One message of a defense without a memory.

    Args:
        defense: a perturbation.
        release: the message with its batch.
        source: of the noise.
        uncovered: see `gradguard.defenses.coverage`.

    Returns:
        The message, what is known of it, and the noise's size.
    """
    jacobian = release.jacobian if defense.needs_jacobian else None
    covered = cover(defense, release.gradient, jacobian, uncovered=uncovered, generator=source)
    message = covered.message
    length = norm({n: message[n] - g for n, g in release.gradient.items()}).item()
    cost = {"std": length / max(release.size, 1) ** 0.5, "noise_ratio": length / max(release.norm, 1e-300)}
    return Sent(message=message, knowledge=defense.knowledge(release, message), cost=cost, bare=covered.bare)
