"""Which examples a gradient is of: least squares over the gradients of single examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.structures import rows_of

#: Numbers that may be held at once, in float64: the gradients of all examples.
MEMORY = 50_000_000
#: Multiplications that the least squares may take: seconds.
WORK = 20_000_000_000


@dataclass(frozen=True)
class ExampleWeights:
    """Whose gradients a message holds.

    Args:
        weights: `B` numbers: of each example's own gradient in the message.
        distance: What they leave of the message, relative to its norm.
    """

    weights: tuple[float, ...]
    distance: float

    def present(self) -> list[int]:
        """Indices of the examples that the message holds anything of."""
        largest = max(abs(w) for w in self.weights)
        return [i for i, w in enumerate(self.weights) if abs(w) > 1e-2 * largest]


def example_weights(
    loss_gradient: LossGradient, inputs: Tensor, targets: Tensor, message: Mapping[str, Tensor]
) -> ExampleWeights | None:
    """The weighted sum of single examples' gradients that is closest to `message`.

    Args:
        loss_gradient: the model and the loss.
        inputs: shape `(B, *input_shape)`.
        targets: shape `(B, ...)`.
        message: one tensor per parameter that was sent; elements that are zero count as not sent.

    Returns:
        The weights, or `None` where such a sum says nothing: a single example, so many examples that any vector is a
        sum of them, more than memory should hold, or a model that does not take one example alone.
    """
    total, count = sum(m.numel() for m in message.values()), len(inputs)
    if count < 2 or total < 10 * count or total * count > MEMORY or total * count**2 > WORK:
        return None
    sent = torch.cat([m.double().flatten() for m in message.values()])
    if not sent.any():
        return None
    columns = []
    try:
        for index in range(count):
            own = loss_gradient(inputs[index : index + 1], rows_of(targets, slice(index, index + 1)))
            columns.append(torch.cat([own[n].double().flatten() for n in message]) * (sent != 0))
    except (InputError, RuntimeError, ValueError):
        return None
    basis = torch.stack(columns, dim=1)
    # By the eigenvalues: examples whose gradient is zero or the same as another's leave the matrix short of rank.
    eigenvalues, vectors = torch.linalg.eigh(basis.T @ basis)
    seen = eigenvalues > 1e-12 * eigenvalues[-1]
    weights = vectors @ torch.where(seen, (vectors.T @ (basis.T @ sent)) / eigenvalues.clamp_min(1e-300), 0.0)
    distance = ((basis @ weights - sent).norm() / sent.norm()).item()
    return ExampleWeights(tuple(weights.tolist()), distance)
