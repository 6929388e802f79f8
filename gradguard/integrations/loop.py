"""A plain PyTorch loop, three lines: make it, call it between `backward()` and `step()`, keep its state.

protect = ProtectedSteps(model, loss_fn, defense, optimiser=optimiser)
for inputs, targets in loader:
optimiser.zero_grad()
loss_fn(model(inputs), targets).backward()
protect(inputs, targets)  # what is in `p.grad` may leave now
optimiser.step()
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from gradguard.defenses import Defense, Release, Sent
from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode


class ProtectedSteps:
    """Puts what a defense sends into the parameters' `grad`, step by step.

    Args:
        model: What is trained.
        loss_fn: `(outputs, targets) -> scalar`; needed by defenses that look at the batch.
        defense: Any; noise over rounds keeps its memory here.
        optimiser: Whose learning rate a stream goes by; `None`: it is constant.
        key: Of the secret noise, see `Defense.start`.
        run: A public label of the stream, see `Defense.start`.
        train_mode: See `LossGradient`.
        generator: A seeded generator in the place of the key, for tests and benchmarks; it warns.

    Raises:
        InputError: If `defense` is none, or the optimiser's groups have different learning rates.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        defense: Defense,
        *,
        optimiser: torch.optim.Optimizer | None = None,
        key: bytes | None = None,
        run: bytes | None = None,
        train_mode: TrainMode = "error",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(defense, Defense):
            raise InputError(f"`defense` must be a gradguard.defenses.Defense, got {type(defense).__name__}.")
        self.model, self.loss_fn, self.train_mode = model, loss_fn, train_mode
        self.optimiser = optimiser
        self.protector = defense.start(key, run=run, generator=generator)

    def __call__(self, inputs: Any = None, targets: Any = None, *, ids: Sequence[Hashable] | None = None) -> Sent:
        """Replace every `grad` by what is sent in its place.

        Args:
            inputs: Of the step's batch, `(B, *input_shape)`; only for defenses that look at it.
            targets: The same, `(B, ...)`.
            ids: A name for each example, for noise that goes by it.

        Returns:
            What the defense made of the gradient.

        Raises:
            InputError: Before `backward()`, or if the defense cannot work on this step. No `grad` has then changed.
        """
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        given = {n: p.grad.detach() for n, p in trained.items() if p.grad is not None}
        if not given:
            raise InputError("No parameter has a gradient: call `backward()` first, and protect before `step()`.")
        batch: dict[str, Any] = {}
        if inputs is not None:
            function = LossGradient(self.model, self.loss_fn, train_mode=self.train_mode)
            batch = {"loss_gradient": function, "inputs": inputs, "targets": targets}
        sent = self.protector.protect(Release(given, ids=ids, learning_rate=self._learning_rate(), **batch))
        with torch.no_grad():
            for name, value in sent.message.items():
                grad = trained[name].grad
                assert grad is not None  # it was given
                grad.copy_(value)
        return sent

    def withdraw(self) -> None:
        """The last step was not taken: see `Protector.withdraw`."""
        self.protector.withdraw()

    def state_dict(self) -> dict[str, Any]:
        """See `Protector.state_dict`: everything but the key."""
        return self.protector.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Protector.load_state_dict`."""
        self.protector.load_state_dict(state)

    def _learning_rate(self) -> float | None:
        if self.optimiser is None:
            return None
        rates = {float(group["lr"]) for group in self.optimiser.param_groups}
        if len(rates) > 1:
            raise InputError(
                f"The optimiser's groups have the learning rates {sorted(rates)}; a stream goes by one. Use one rate, "
                "or leave `optimiser` out and keep the rates constant."
            )
        rate = rates.pop()
        return rate if rate > 0 else None
