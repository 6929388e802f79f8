"""What some examples of a batch add to its gradient: what an attacker faces who knows all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.problems import Batch
from gradguard.functional.structures import Rest, rows_of, with_rows
from gradguard.functional.vectors import Gradient, flatten

#: Two gradients whose directions differ by less than this are multiples of each other.
PARALLEL = 1e-4


@dataclass(frozen=True)
class Contribution:
    """The examples' part of the batch's gradient, `share = scale * function(inputs, rest)`.

    Args:
        function: A loss gradient of these examples alone. The user's own loss where the batch's gives them a plain
            weight; else the batch's loss with everything of the others fixed.
        inputs: `(n, *input_shape)`, the true ones.
        rest: Their targets and known inputs.
        own: `function(inputs, rest)`.
        scale: The weight.
    """

    function: LossGradient
    inputs: Tensor
    rest: Rest
    own: Gradient
    scale: float


def contribution(
    function: LossGradient,
    parameters: Gradient,
    batch: tuple[Tensor, Rest],
    examples: list[int],
    whole: Batch | None,
    way: str,
) -> Contribution:
    """See `InputJacobian.contribution`."""
    inputs, rest = batch
    index = torch.tensor(examples, device=inputs.device)
    some, known = inputs[index], rows_of(rest, index)
    if len(examples) == len(inputs):
        return Contribution(function, some, known, function.gradient_at(parameters, some, known), 1.0)
    if way == "coupled":
        within = function.in_company(inputs, rest, index)
        return Contribution(within, some, known, within.gradient_at(parameters, some, known), 1.0)
    if whole is None:
        with torch.no_grad():
            whole = Batch(inputs, rest, function.outputs(parameters, inputs, rest))
    fixed = function.with_loss(_OthersFixed(function, whole, index))
    share = fixed.gradient_at(parameters, some, known)
    b = flatten(share)
    if not bool(b.abs().max() > 0):
        raise InputError(
            f"The loss gives the examples {examples} no weight in this batch (an ignored label, a class weight of "
            "zero), so its gradient does not show them. Leave them out."
        )
    try:
        own = function.gradient_at(parameters, some, known)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a loss that does not take so few examples
        return Contribution(fixed, some, known, share, 1.0)
    a = flatten(own)
    scale = (a @ b) / (a @ a).clamp_min(torch.finfo(a.dtype).tiny)
    if bool((b - scale * a).norm() <= PARALLEL * b.norm()):
        return Contribution(function, some, known, own, float(scale))
    return Contribution(fixed, some, known, share, 1.0)


@dataclass(frozen=True, repr=False)
class _OthersFixed:
    """The batch's loss as a function of some examples' outputs and targets."""

    function: LossGradient
    batch: Batch
    index: Tensor

    def __repr__(self) -> str:
        return f"{self.function.loss_fn} of {len(self.index)} of {self.batch.count} examples"

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        whole = with_rows(self.batch.outputs, outputs, self.index, self.batch.count)
        rest = self.batch.rest
        if isinstance(rest, Tensor) and isinstance(targets, Tensor) and targets.shape[1:] == rest.shape[1:]:
            rest = rest.index_copy(0, self.index, targets.to(rest.dtype))
        return self.function.loss_of(whole, rest)
