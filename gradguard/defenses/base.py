"""The frame every defense fits into: a gradient goes in, what to add to it comes out."""

from __future__ import annotations

import secrets
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.draws import isotropic, randn, scaled_to
from gradguard.defenses.protector import Protector
from gradguard.defenses.release import Release
from gradguard.defenses.stream import SEEDED, MessageNoise, NoiseStream, fresh_noise
from gradguard.defenses.strengths import require_positive
from gradguard.errors import InputError, SeededNoiseWarning
from gradguard.functional.checks import check_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient, add
from gradguard.threats.knowledge import Knowledge

__all__ = ["Defense", "isotropic", "randn", "require_positive", "scaled_to"]


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A perturbation of gradients: strength in the constructor, the gradient at the call.

    A subclass is a frozen, keyword-only dataclass that defines `perturbation`. One that needs to know how the
    gradient depends on the inputs sets `needs_jacobian`; one that draws nothing at random sets `random` to `False`. See
    CONTRIBUTING.md, "A defense".
    """

    needs_jacobian: ClassVar[bool] = False
    #: Whether it draws secret noise. What does not (pruning) hides nothing from an attacker who knows it.
    random: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The defense's name in tables."""
        return type(self).__name__

    def __call__(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`gradient` perturbed: the batch's mean gradient in, what to send out. Neither argument is changed.

        Args:
            gradient: one tensor per parameter.
            jacobian: of that gradient by the inputs, for a defense that needs it.
            generator: of the noise. Default: a new key from the operating system, so that nobody can draw the noise
                again. `NoiseStream.message()` gives the noise of a message in a stream. A seeded generator makes the
                noise reproducible, for tests, and warns (`SeededNoiseWarning`).

        Returns:
            What to send, one tensor per parameter.

        Raises:
            InputError: for a gradient that is not finite, or where the Jacobian is missing.
        """
        if self.random and generator is not None and not isinstance(generator, MessageNoise):
            warnings.warn(f"{self.name}: {SEEDED}", SeededNoiseWarning, stacklevel=2)
        return add(gradient, self.checked_perturbation(gradient, jacobian, generator=generator))

    def checked_perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`perturbation`, after checking what it is given.

        Args:
            gradient: One tensor per parameter.
            jacobian: Of that gradient by the inputs, for a defense that needs it.
            generator: Of the noise. Default: a new key from the operating system, so that the noise is secret.

        Returns:
            What to add to `gradient`, one tensor per parameter.

        Raises:
            InputError: The gradient is not finite, or the Jacobian is missing.
        """
        source = self._checked_source(gradient, jacobian, generator)
        return self.perturbation(gradient, jacobian, generator=source)

    def start(
        self,
        key: bytes | None = None,
        *,
        run: bytes | None = None,
        secure: bool = False,
        generator: torch.Generator | None = None,
    ) -> Protector:
        """This defense at work on the messages of one sender, one after the other.

        Args:
            key: of the secret noise, 32 bytes (default: new ones from the operating system). With the same key and
                its state a stream goes on after an interruption; without the state a new one begins, with other noise.
            run: a public label of the stream. Default: a random one, which the state holds. A label of your own is your
                word that it is used once: two streams of one key and one label have the same noise.
            secure: see `NoiseStream`: for an (epsilon, delta) claim.
            generator: a seeded generator in the place of the key, for tests and benchmarks; it warns.

        Returns:
            The protector: `protector.protect(release)` for each message.

        Raises:
            InputError: if both a key and a generator are given.
        """
        if key is not None and generator is not None:
            raise InputError("Give a `key` or a seeded `generator`, not both.")
        if generator is not None and self.random and not isinstance(generator, MessageNoise):
            warnings.warn(f"{self.name}: {SEEDED}", SeededNoiseWarning, stacklevel=2)
        return self._protector(
            NoiseStream(key, run=secrets.token_bytes(16) if run is None else run, secure=secure), generator
        )

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """What the receiver of `message` knows of how it was made, the secret numbers apart.

        Default: for noise its mean square in each tensor; for a defense that draws nothing, which elements it set to
        zero. A defense that can say more overrides this, and is then attacked by someone who knows more.

        Args:
            release: what was protected.
            message: what is sent.

        Returns:
            The declaration that adaptive attacks are built from.
        """
        if self.random:
            return Knowledge(variance={n: (message[n] - g).square().mean() for n, g in release.gradient.items()})
        zeroed = any(bool(((message[n] == 0) & (g != 0)).any()) for n, g in release.gradient.items())
        return Knowledge(mask={n: m != 0 for n, m in message.items()} if zeroed else None)

    def _checked_source(
        self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator | None
    ) -> torch.Generator:
        """Where to draw from, after refusing a gradient that is not finite and a Jacobian that is missing."""
        check_gradient(gradient, gradient)
        if self.needs_jacobian and jacobian is None:
            raise InputError(
                f"{self.name} depends on how the gradient changes with the inputs: pass "
                "`jacobian=InputJacobian(LossGradient(model, loss_fn), inputs, targets)`."
            )
        if generator is not None:
            return generator
        # Also for a subclass that hands `generator` to PyTorch, where `None` means the global generator.
        return fresh_noise(next((g.device for g in gradient.values()), "cpu"))

    def _protector(self, stream: NoiseStream, generator: torch.Generator | None) -> Protector:
        """The running thing; a defense with a state over rounds returns a subclass."""
        return Protector(self, stream, generator=generator)

    @abstractmethod
    def perturbation(
        self, gradient: Gradient, jacobian: InputJacobian | None = None, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`delta`, what to add to `gradient`.

        Args:
            gradient: One tensor per parameter.
            jacobian: Of that gradient by the inputs, for a defense that needs it.
            generator: Of the noise.

        Returns:
            One tensor per parameter, in the parameter's shape.
        """
