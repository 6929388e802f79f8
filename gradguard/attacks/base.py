"""What an attack sees, what it returns, and the frame every attack fits into."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.precision import full_precision
from gradguard.threats.observation import Observation, Reconstruction

#: What models and losses raise on what they were not written for.
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack: hyperparameters in the constructor, the observation at the call.

    A subclass is a frozen, keyword-only dataclass that defines `run` and, if it cannot work on every observation,
    `check`. See CONTRIBUTING.md, "An attack".
    """

    recovers_inputs: ClassVar[bool] = True
    #: Whether it can attack what a client sends after several local steps.
    takes_local_training: ClassVar[bool] = False
    #: Whether it can attack one input of several, and examples of a batch that couples them (`LossGradient.bind`).
    takes_structures: ClassVar[bool] = False
    #: Whether it can do without the gradient of some parameters (`Observation.not_sent`).
    takes_missing_gradients: ClassVar[bool] = False
    #: Whether it finds an unknown factor on the sent gradient (`Observation(scale=None)`).
    takes_free_scale: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return type(self).__name__

    def __call__(self, observation: Observation, *, generator: torch.Generator | None = None) -> Reconstruction:
        """Attack.

        Args:
            observation: What the attacker sees.
            generator: All of the attack's randomness; the same state gives the same result.

        Returns:
            What was found. `details["scale"]` is the factor of the sent gradient that the matching loss is taken with.

        Raises:
            InputError: Before any long work, for an observation or a generator that cannot be used.
            UnsupportedModelError: The attack cannot work on this model, or the model fails during the attack.
        """
        check_generator(generator)
        self.check_all(observation)
        start = time.perf_counter()
        with full_precision(), failures_of(self, observation):
            result = self.run(observation.at_unit_scale(), generator)
            return self.finished(observation, result, time.perf_counter() - start)

    def finished(self, observation: Observation, result: Reconstruction, seconds: float) -> Reconstruction:
        """`result` with what every attack's has: its name, its matching loss and its factor, its time."""
        matching_loss, details = result.matching_loss, result.details
        if observation.scale is not None and "scale" in details:
            details = details | {"scale": observation.scale}  # the attack has seen it at 1
        if result.inputs is not None and result.labels is not None:
            # In float64 on the CPU: attacks of different precision are compared by it.
            exact = observation.in_dtype(torch.float64)
            matching_loss, scale = exact.match(result.inputs, result.labels)
            details = details | {"scale": scale}
        return replace(result, attack=self.name, matching_loss=matching_loss, details=details, seconds=seconds)

    def check_all(self, observation: Observation) -> None:
        """`check`, after what holds for every attack."""
        if not isinstance(observation, Observation):
            raise InputError(f"{self.name} is given `Observation` objects, got {type(observation).__name__}.")
        if observation.local is not None and not self.takes_local_training:
            raise InputError(
                f"{self.name} attacks a single gradient, and this client took {observation.local.steps} local steps. "
                "Use a gradient-matching attack, which differentiates through the steps."
            )
        missing = observation.not_sent
        if missing and not self.takes_missing_gradients:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{self.name} needs the gradient of every parameter, and that of {missing[0]!r}{more} was not sent. "
                "Use a gradient-matching attack, which matches what was sent."
            )
        if observation.scale is None and not self.takes_free_scale:
            raise InputError(
                f"{self.name} needs the factor of the sent gradient, and `scale=None` says that it is unknown. Give "
                "the factor, or use a gradient-matching attack, which solves for it."
            )
        function = observation.loss_gradient
        if (function.is_bound or function.has_company) and not self.takes_structures:
            raise InputError(
                f"{self.name} attacks examples that are one tensor each and that model and loss keep apart. Use "
                "a gradient-matching attack, which takes other inputs and other examples as known."
            )
        with full_precision(), failures_of(self, observation):
            observation.check()
            self.check(observation.at_unit_scale())

    def check(self, observation: Observation) -> None:
        """Raise for an observation that this attack cannot work on. Cheap; called before `run`."""

    @abstractmethod
    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack itself. Called by `__call__`, after the checks.

        Args:
            observation: With the factor of the sent gradient divided out: its `scale` is 1, or `None` where it is
                unknown.
            generator: All of the attack's randomness.

        Returns:
            What was found; `__call__` fills in `attack`, `matching_loss` and `seconds`.
        """


def check_generator(generator: object) -> None:
    """Raise `InputError` for what is no generator, a bare seed above all."""
    if generator is not None and not isinstance(generator, torch.Generator):
        seed = generator if isinstance(generator, int) else 0
        raise InputError(
            f"`generator` must be a `torch.Generator` or None, got {type(generator).__name__}. For a fixed seed write "
            f"`torch.Generator().manual_seed({seed})`."
        )


@contextmanager
def failures_of(attack: Attack, observation: Observation) -> Iterator[None]:
    """What a user's model or loss raises while it is attacked, as an `UnsupportedModelError` that says so.

    Args:
        attack: Named in the message.
        observation: Its model and loss are named in the message.

    Yields:
        Nothing: what runs inside the block is watched.

    Raises:
        InputError: As it was raised inside; so do errors of files and a user's own exceptions pass.
        OutOfMemoryError: As it was raised inside.
        UnsupportedModelError: In the place of any of `MODEL_ERRORS`.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except MODEL_ERRORS as error:
        model = type(observation.loss_gradient.model).__name__
        raise UnsupportedModelError(
            f"{attack.name} cannot work on {model} with {observation.loss_gradient.loss_fn}: while it computed, they "
            f"raised {type(error).__name__}: {error}"
        ) from error


def attack_candidates(
    attack: Attack, candidates: Sequence[Observation], *, generator: torch.Generator | None = None
) -> tuple[Reconstruction, int]:
    """Attack one sent gradient under several guesses at what is not known.

    The matching loss is relative to the sent gradient, so that guesses can be compared by it.

    Args:
        attack: Run once per guess.
        candidates: Observations that differ in what the attacker guesses: a client's learning rate, its steps or the
            size of its batches (`local`), the labels.
        generator: All of the attack's randomness.

    Returns:
        The reconstruction with the lowest matching loss (NaN comes last), and its index in `candidates`.

    Raises:
        InputError: There is no candidate.
    """
    if not candidates:
        raise InputError("There is no candidate to attack: give an observation for each guess.")
    results = [attack(observation, generator=generator) for observation in candidates]
    best = min(range(len(results)), key=lambda i: (math.isnan(results[i].matching_loss), results[i].matching_loss))
    return results[best], best
