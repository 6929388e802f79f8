"""A release: what leaves a client in a round, with all that a defense may need to know of it, computed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gradguard.errors import InputError
from gradguard.functional.checks import check_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient, norm
from gradguard.threats.knowledge import NOTHING_DONE, Knowledge


class Release:
    """What is about to leave: a gradient, the batch that it is of, and where in the stream it stands.

    What is expensive (the Jacobian, the norms of the examples' gradients) is computed when a defense first asks for it,
    once for all that ask.

    Args:
        gradient: one tensor per parameter: what is sent without a defense. Default: the batch's gradient.
        loss_gradient: the model and the loss at the weights that the message is computed at; needed by defenses that
            look at examples. `None` where a defense needs none.
        inputs: `(B, *input_shape)`, or a structure (see `LossGradient.bind`).
        targets: `(B, ...)`.
        ids: a name for each example, the same each time it is used: permanent noise and totals over rounds go by it.
        learning_rate: `eta_t`, what the receiver multiplies the message by: a stream cancels `eta_t n_t`.
        sensitivity: by how much one example can change `gradient` (Euclidean norm), where something bounds it
            (clipping); noise multipliers are of it.

    Raises:
        InputError: if neither the gradient nor all of model, inputs and targets are given, or they do not fit.
    """

    def __init__(
        self,
        gradient: Gradient | None = None,
        *,
        loss_gradient: LossGradient | None = None,
        inputs: Any = None,
        targets: Any = None,
        ids: Sequence[Hashable] | None = None,
        learning_rate: float | None = None,
        sensitivity: float | None = None,
    ) -> None:
        if gradient is None and (loss_gradient is None or inputs is None):
            raise InputError("A release needs its `gradient`, or `loss_gradient`, `inputs` and `targets`.")
        if loss_gradient is not None and inputs is not None:
            loss_gradient, inputs, targets = loss_gradient.bind(inputs, targets)
        if gradient is not None:
            check_gradient(gradient, gradient)
        if ids is not None and inputs is not None and len(ids) != len(inputs):
            raise InputError(f"`ids` must name each example: {len(inputs)} examples, {len(ids)} ids.")
        if learning_rate is not None and not 0 < learning_rate < float("inf"):
            raise InputError(f"`learning_rate` must be positive and finite, got {learning_rate}.")
        self._gradient = gradient
        self.loss_gradient, self.inputs, self.targets = loss_gradient, inputs, targets
        self.ids = None if ids is None else tuple(ids)
        self.learning_rate = learning_rate
        self.sensitivity = sensitivity

    @classmethod
    def of(cls, jacobian: InputJacobian, gradient: Gradient | None = None, **fields: Any) -> Release:
        """A release whose Jacobian exists already.

        Args:
            jacobian: of the batch, per example.
            gradient: as in the constructor.
            fields: as in the constructor.

        Returns:
            The release.
        """
        inputs, targets = jacobian.batch
        release = cls(gradient, loss_gradient=None, **fields)
        release.loss_gradient, release.inputs, release.targets = jacobian.gradient, inputs, targets
        release.jacobian = jacobian
        return release

    def with_gradient(self, gradient: Gradient, *, sensitivity: float | None = None) -> Release:
        """The same batch with another message: what a first step of a defense hands to the next.

        Args:
            gradient: the message.
            sensitivity: of it; `None`: nothing bounds it any more.

        Returns:
            A release that shares what was computed.
        """
        other = object.__new__(Release)
        other.__dict__.update(self.__dict__)
        other._gradient, other.sensitivity = gradient, sensitivity
        return other

    @property
    def gradient(self) -> Gradient:
        """What is sent without a defense, one tensor per parameter."""
        if self._gradient is None:
            self._gradient = self._model("its gradient")(self.inputs, self.targets)
        return self._gradient

    @cached_property
    def norm(self) -> float:
        """The Euclidean norm of `gradient`."""
        return norm(self.gradient).item()

    @property
    def size(self) -> int:
        """`P`: the elements of the message."""
        return sum(g.numel() for g in self.gradient.values())

    @property
    def batch_size(self) -> int:
        """`B`.

        Raises:
            InputError: without the batch.
        """
        if self.inputs is None:
            raise InputError("The number of examples of a release is not known: give its `inputs` and `targets`.")
        return len(self.inputs)

    @property
    def device(self) -> torch.device:
        """Of the message."""
        return next((g.device for g in self.gradient.values()), torch.device("cpu"))

    @cached_property
    def jacobian(self) -> InputJacobian:
        """Of the batch's gradient by each example, per example."""
        return InputJacobian(self._model("how its gradient depends on the inputs"), self.inputs, self.targets)

    def _model(self, what: str) -> LossGradient:
        if self.loss_gradient is None or self.inputs is None:
            raise InputError(
                f"This defense has to know {what}: give the release `loss_gradient=LossGradient(model, loss_fn)`, "
                "`inputs` and `targets`."
            )
        return self.loss_gradient


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a defense makes of a release.

    Args:
        message: what to send, one tensor per parameter.
        knowledge: what the receiver knows of it beside the numbers: adaptive attacks are built from this.
        cost: what it cost, by name: `std` (of the noise on one element), `noise_ratio`, and what a defense adds.
        bare: tensors that the defense alone left as they are, and that were covered with isotropic noise.
        sensitivity: by how much one example can change the message's noise-free part, where something bounds it.
    """

    message: Gradient = field(repr=False)
    knowledge: Knowledge = NOTHING_DONE
    cost: dict[str, float] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    sensitivity: float | None = None
