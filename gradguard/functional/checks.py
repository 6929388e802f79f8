"""What no gradient can be taken of: refused before long work, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradguard.errors import InputError

LossFunction = Callable[[Any, Any], Tensor]

#: Dtypes of class indices.
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_batch_shape(inputs: Any, targets: Any, *, structured: bool = False) -> None:
    """Refuse what no model could take.

    Args:
        inputs: `(B, *input_shape)`, floating point.
        targets: A tensor with `B` rows, or a dictionary of such tensors.
        structured: `inputs` is one input of several, which may have shape `(B,)`.

    Raises:
        InputError: Something is no tensor, there is no example, the lengths differ, or the inputs are integers.
    """
    if not isinstance(inputs, Tensor):
        raise InputError(f"`inputs` must be a tensor, got {type(inputs).__name__}.")
    if inputs.ndim < (1 if structured else 2) or inputs.numel() == 0:
        raise InputError(
            f"`inputs` must have shape (B, *input_shape) with B >= 1, got {tuple(inputs.shape)}: an empty batch."
        )
    for name, part in targets.items() if isinstance(targets, dict) else [("targets", targets)]:
        if not isinstance(part, Tensor):
            raise InputError(f"`{name}` must be a tensor, got {type(part).__name__}.")
        if part.ndim == 0 or len(part) != len(inputs):
            raise InputError(
                f"`{name}` must have one entry per example: {len(inputs)} inputs, {name} of shape {tuple(part.shape)}."
            )
    if not inputs.is_floating_point():
        raise InputError(
            f"`inputs` must be floating point to have a derivative, got {inputs.dtype}. Scale images to [0, 1] "
            "(`images.float() / 255`); for tokens, measure in the space of their embeddings: "
            '`LossGradient(..., input_module="...")`, and pass it `gradient.embed(tokens)`.'
        )


def class_indices(targets: Tensor, name: str = "targets") -> Tensor:
    """Class indices of any integer dtype, or bool, as int64; what is int64 already is returned as it is.

    Args:
        targets: class indices of any shape.
        name: what the caller calls them, for the message.

    Returns:
        The same indices in int64, on the same device.

    Raises:
        InputError: for what is no tensor, and for floating-point or complex numbers: whether 2.0 is a class or a value
            is for the user to say.
    """
    if not isinstance(targets, Tensor):
        raise InputError(f"`{name}` must be a tensor of class indices, got {type(targets).__name__}.")
    if targets.is_floating_point() or targets.is_complex():
        raise InputError(
            f"`{name}` must be class indices, integers of any width, got {targets.dtype}. Where they are whole numbers "
            f"write `{name}.long()`; class probabilities have shape (B, C)."
        )
    return targets if targets.dtype == torch.int64 else targets.to(torch.int64)


def check_devices(inputs: Tensor, targets: Any, device: torch.device) -> None:
    """Raises `InputError` unless everything is on the model's device."""
    parts = targets if isinstance(targets, dict) else {"targets": targets}
    for name, tensor in {"inputs": inputs, **parts}.items():
        if tensor.device != device:
            raise InputError(
                f"`{name}` are on {tensor.device}, the model is on {device}. "
                f"Move one to the other: `{name}.to({str(device)!r})`."
            )


def check_labels(outputs: Any, targets: Any, loss_fn: LossFunction) -> None:
    """Refuse class indices outside `0 .. C-1` (the loss's `ignore_index` excepted).

    Targets of another shape than the ones below mean something that only the loss knows, and so do outputs that are no
    tensor: they pass.

    Args:
        outputs: Scores `(B, C, *positions)`, as `cross_entropy` takes them, or `(B, *positions, C)`, as language models
            give them.
        targets: `(B, *positions)`.
        loss_fn: Its `ignore_index` is allowed, -100 where it has none.

    Raises:
        InputError: A label is out of range.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if targets.is_floating_point() or targets.is_complex() or outputs.ndim < 2:
        return
    targets = class_indices(targets)
    if targets.shape == (*outputs.shape[:1], *outputs.shape[2:]):
        classes = outputs.shape[1]
    elif targets.shape == outputs.shape[:-1]:
        classes = outputs.shape[-1]
    else:
        return
    valid = (targets >= 0) & (targets < classes)
    valid |= targets == getattr(loss_fn, "ignore_index", -100)
    if not valid.all():
        wrong = targets[~valid].flatten()[0].item()
        raise InputError(
            f"Label {wrong} is out of range: the model has {classes} outputs, so labels go from 0 to {classes - 1}."
        )


def index_targets(targets: Any) -> Any:
    """Whole numbers of any size as int64, which losses over classes take; everything else as it is."""
    if isinstance(targets, Tensor) and targets.dtype in INDEX_DTYPES:
        return targets.to(torch.int64)
    return targets


def as_loss_takes_them(targets: Any, outputs: Any) -> Any:
    """Targets in the dtype that losses take: class indices int64; truth values as numbers where they match scores."""
    if not isinstance(targets, Tensor):
        return targets
    if targets.dtype == torch.bool:
        matches = isinstance(outputs, Tensor) and outputs.shape == targets.shape
        return targets.to(outputs.dtype) if matches else targets.to(torch.int64)
    return index_targets(targets)


def check_loss(loss_of_batch: Callable[[], Tensor], loss_fn: LossFunction) -> Tensor:
    """The loss, if it is one finite number and the same when it is asked again.

    Args:
        loss_of_batch: Computes it.
        loss_fn: Named in messages.

    Returns:
        The loss, a scalar tensor.

    Raises:
        InputError: It is something else, or the loss function does not take these outputs and targets.
        OutOfMemoryError: As the loss raised it.
    """
    try:
        loss, again = loss_of_batch(), loss_of_batch()
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # whatever the user's loss raises
        raise InputError(
            f"The loss {loss_fn!r} does not take these outputs and targets: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(loss, Tensor):
        raise InputError(f"The loss must be a tensor with one number, got {type(loss).__name__}.")
    if loss.numel() != 1 or loss.ndim:
        raise InputError(
            f'The loss has shape {tuple(loss.shape)}; it must be one number per batch. Use `reduction="mean"` or "sum".'
        )
    if not torch.isfinite(loss):
        raise InputError(
            f"The loss is {loss.item()}, so its gradient says nothing. Look for diverged parameters, "
            "unscaled inputs, a batch without a single target that counts, or a log of zero in the loss."
        )
    if not torch.equal(loss, again):
        raise InputError(
            f"The loss {loss_fn!r} gives another number each time it is asked ({loss.item():.6g}, {again.item():.6g}): "
            "it draws random numbers or keeps a state. Pass a loss that is a function of outputs and targets alone."
        )
    return loss


def check_gradient(gradient: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check a gradient.

    Args:
        gradient: One tensor per parameter.
        like: Tensors of the names, shapes and devices that it must have.

    Raises:
        InputError: Names, shapes or devices are others, or a value is not finite.
    """
    if not isinstance(gradient, Mapping):
        raise InputError(f"A gradient is a dictionary keyed as `named_parameters()`, got {type(gradient).__name__}.")
    missing = [n for n in like if n not in gradient]
    unexpected = [n for n in gradient if n not in like]
    if missing or unexpected:
        raise InputError(
            f"The gradient's names are not the model's: missing {missing[:5]}, unexpected {unexpected[:5]}. "
            "Key it as `model.named_parameters()`, trainable parameters only."
        )
    for name, reference in like.items():
        value = gradient[name]
        if value.shape != reference.shape:
            raise InputError(
                f"Gradient {name!r} has shape {tuple(value.shape)}, the parameter {tuple(reference.shape)}."
            )
        if value.device != reference.device:
            raise InputError(
                f"Gradient {name!r} is on {value.device}, the model on {reference.device}. Move one to the other."
            )
    # One number is read back from the device where all is well.
    if not torch.stack([torch.isfinite(v).all() for v in gradient.values()]).all():
        broken = [n for n, v in gradient.items() if not torch.isfinite(v).all()]
        raise InputError(
            f"The gradient of {broken[0]!r} holds NaN or infinite values ({len(broken)} of {len(like)} tensors do). "
            "Nothing can be measured on it, and sending it would spoil the receiver's model."
        )
