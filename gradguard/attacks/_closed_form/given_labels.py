"""What the closed-form attacks ask of an observation before any work: labels that the loss takes, a derivative."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.checks import check_labels
from gradguard.threats.observation import Observation


def with_usable_labels(observation: Observation) -> Observation:
    """`observation` with integer labels as int64. Costs a forward pass.

    Raises:
        InputError: the labels are no tensor, out of range, or nothing the loss takes beside the model's outputs.
    """
    labels = observation.labels
    if labels is None:
        return observation
    if not isinstance(labels, Tensor):
        raise InputError(f"`labels` must be a tensor, got {type(labels).__name__}: `torch.tensor(labels)`.")
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        labels = labels.to(torch.int64)
    gradient = observation.loss_gradient
    x = torch.zeros(observation.batch_size, *observation.input_shape, device=gradient.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = gradient.outputs(gradient.parameters(), gradient.cast(x))
        check_labels(outputs, labels, gradient.loss_fn)
        try:
            loss = gradient.loss_fn(outputs, gradient.cast(labels))
        except Exception as error:  # a user's loss may raise anything on targets that are not its own
            raise InputError(
                f"The loss does not take `labels` {labels.dtype} of shape {tuple(labels.shape)} beside outputs of "
                f"shape {tuple(outputs.shape)}: {error}"
            ) from error
    if not isinstance(loss, Tensor) or loss.ndim:
        raise InputError('The loss must be one number per batch. Use `reduction="mean"` or "sum".')
    return replace(observation, labels=labels)


def check_differentiable(observation: Observation) -> None:
    """Costs a gradient.

    Raises:
        UnsupportedModelError: the model's gradient, by which results are compared, cannot be computed.
    """
    gradient = observation.loss_gradient
    count = observation.batch_size
    x = torch.zeros(count, *observation.input_shape, device=gradient.device)
    trials = [torch.zeros(count, dtype=torch.int64, device=x.device), x.new_zeros(count, 1)]
    failure: Exception | None = None
    for labels in trials if observation.labels is None else [observation.labels]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                observation.gradient(gradient.parameters(), gradient.cast(x), gradient.cast(labels))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the model, or of the loss on targets that are not its own
            failure = error
        else:
            return
        if any(word in str(failure) for word in ("torch.func", "functorch")):
            raise UnsupportedModelError(
                f"The gradient of {type(gradient.model).__name__}, by which what is found is checked, cannot be "
                "computed (a custom autograd.Function or checkpointing?). Attack the model without it. Reason: "
                f"{str(failure).splitlines()[0]}"
            ) from failure
