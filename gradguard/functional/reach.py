"""Which parameters a loss depends on at all."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.functional.loss_gradient import LossGradient


def unreached_parameters(loss_gradient: LossGradient, inputs: Tensor, targets: Tensor) -> tuple[str, ...]:
    """Trainable parameters that the loss does not depend on, by autograd's graph and not by a zero gradient.

    An auxiliary head that only another loss term reaches, a table that is looked up outside of what is measured, layers
    behind a `detach`. A dead unit's parameters are reached, though their gradient is zero.

    Args:
        loss_gradient: the model and the loss.
        inputs: shape `(B, *input_shape)`.
        targets: shape `(B, ...)`.

    Returns:
        Their names, as in `named_parameters()`. Costs one forward and one backward pass.
    """
    loss_gradient, inputs, targets = loss_gradient.bind(inputs, targets)
    parameters = {n: p.detach().clone().requires_grad_(True) for n, p in loss_gradient.parameters().items()}
    with torch.enable_grad():
        loss = loss_gradient.loss(parameters, loss_gradient.cast(inputs), loss_gradient.cast(targets))
    if not loss.requires_grad:
        return tuple(parameters)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return tuple(n for n, g in zip(parameters, found, strict=True) if g is None)
