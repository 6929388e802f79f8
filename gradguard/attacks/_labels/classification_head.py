"""Where a model's class scores come from: its head found and checked, before labels are restored from its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.threats.observation import Observation


@dataclass(frozen=True, kw_only=True)
class ClassificationHead:
    """The `nn.Linear` whose output is the model's.

    `weight`, `bias`: its parameters' names in `named_parameters()` (`bias` is `None` without one), of shapes
    `(num_classes, num_features)` and `(num_classes,)`. `log_softmax`: the model ends in a log-softmax after it.
    `nonnegative`: no feature of two random examples was below zero, as after a ReLU.
    """

    weight: str
    bias: str | None
    num_classes: int
    num_features: int
    log_softmax: bool = False
    nonnegative: bool = False


def classification_head(model: nn.Module | LossGradient, input_shape: Sequence[int]) -> ClassificationHead:
    """The head of `model`, found by running two random examples and looking for the Linear whose output comes out.

    `input_shape`: of one example. Costs one forward pass; changes nothing in the model.
    Raises `UnsupportedModelError`, naming the module, if the outputs are no `(B, C)`, if no Linear gives them (up to a
    log-softmax), or if its weight is frozen, shared, used twice, or computed from other parameters.
    """
    function = model if isinstance(model, LossGradient) else LossGradient(model, F.cross_entropy, train_mode="eval")
    function.check_model()
    outputs, calls = _probe(function, input_shape)
    name = type(function.model).__name__
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UnsupportedModelError(
            f"Two examples through {name} give {found}. Labels are restored from models whose outputs are one row of "
            "class scores per example, (B, C): flatten them, or return the scores alone."
        )
    for module_name, module, output, nonnegative in reversed(calls):
        if not isinstance(module, nn.Linear) or output is None or output.shape != outputs.shape:
            continue
        log_softmax = torch.equal(output.log_softmax(1), outputs)
        if log_softmax or torch.equal(output, outputs):
            times = sum(m is module for _, m, *_ in calls)
            head = _head(function, module_name, module, log_softmax=log_softmax, times=times)
            return replace(head, nonnegative=nonnegative)
    last = f"{calls[-1][0]!r} ({type(calls[-1][1]).__name__})" if calls else "no module at all"
    raise UnsupportedModelError(
        f"The outputs of {name} are not those of an nn.Linear; the last layer that ran is {last}. Labels are restored "
        "from the gradient of a Linear that gives the class scores: end the model in one (for a 1x1 convolution before "
        "pooling: pool first), and leave the softmax to the loss."
    )


#: A layer that ran: its name, itself and, for a Linear, what came out and whether all that went in was above zero.
Call = tuple[str, nn.Module, Tensor | None, bool]


def _probe(function: LossGradient, input_shape: Sequence[int]) -> tuple[Tensor, list[Call]]:
    """The outputs of two random examples, and the layers that ran on the way."""
    shape = (2, *input_shape)
    # Of both signs: a head that takes the inputs themselves would seem to have non-negative features.
    inputs = (
        torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(function.device) - 0.5
    )
    calls: list[Call] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple, object], None]:
        def record(module: nn.Module, taken: tuple, output: object) -> None:
            # A copy, since an activation after the head may work in place.
            kept = output.clone() if isinstance(module, nn.Linear) and isinstance(output, Tensor) else None
            nonnegative = kept is not None and bool(taken) and bool((taken[0] >= 0).all())
            calls.append((name, module, kept, nonnegative))

        return record

    handles = [
        module.register_forward_hook(recorder(name or type(module).__name__))
        for name, module in function.model.named_modules()
        if isinstance(module, nn.Linear) or not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            return function.outputs(function.parameters(), function.cast(inputs)), calls
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InputError(
            f"Inputs of shape {shape} do not go through {type(function.model).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _head(function: LossGradient, name: str, module: nn.Linear, *, log_softmax: bool, times: int) -> ClassificationHead:
    """The head that `module` is, once it is sure that its weight's gradient is the head's alone."""
    names = {id(p): n for n, p in function.model.named_parameters()}
    weight = names.get(id(module.weight))
    owners = sum(any(p is module.weight for p in m.parameters(recurse=False)) for m in function.model.modules())
    why = None
    if weight is None:
        why = "its weight is computed from other parameters (a parametrization): fold it in first"
    elif not module.weight.requires_grad:
        why = "its weight is frozen, so its gradient is not sent"
    elif times > 1 or owners > 1:
        why = "its weight is used in more than one place, so its gradient is not the head's alone"
    if weight is None or why is not None:
        raise UnsupportedModelError(f"Labels cannot be restored from the head {name!r}: {why}.")
    # A bias that is frozen is as good as none: its gradient is not sent.
    bias = names.get(id(module.bias)) if module.bias is not None and module.bias.requires_grad else None
    return ClassificationHead(
        weight=weight,
        bias=bias,
        num_classes=module.out_features,
        num_features=module.in_features,
        log_softmax=log_softmax,
    )


def check_cross_entropy(function: LossGradient, head: ClassificationHead) -> None:
    """Raises `InputError` unless the loss is a mean cross-entropy of class indices, on the head's outputs.

    Compares the loss's gradient with `(softmax(z) - onehot(y)) / B` on random scores, so that any loss that is one
    passes, whatever its name.
    """
    rows = min(head.num_classes, 32)
    scores = torch.randn(rows, head.num_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = function.cast(scores.to(function.device)).requires_grad_()
    targets = torch.arange(rows, device=scores.device) * head.num_classes // rows
    rule = (
        "Labels are restored under a mean cross-entropy with class indices: `nn.CrossEntropyLoss()` on scores (or "
        "`nn.NLLLoss()` on a log-softmax), without class weights or label smoothing."
    )
    try:
        with torch.enable_grad():
            loss = function.loss_fn(scores.log_softmax(1) if head.log_softmax else scores, targets)
            (own,) = torch.autograd.grad(loss, scores)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"The loss {function.loss_fn} does not take class scores and class indices: {error} {rule}"
        ) from error
    expected = (scores.detach().softmax(1) - F.one_hot(targets, head.num_classes).to(scores.dtype)) / rows
    tolerance = torch.finfo(scores.dtype).eps ** 0.5
    if torch.allclose(own, expected, rtol=0, atol=tolerance / rows):
        return
    if torch.allclose(own / rows, expected, rtol=0, atol=tolerance / rows):
        raise InputError(
            f"The loss {function.loss_fn} sums over the batch. Labels are restored from the mean gradient: use "
            '`reduction="mean"` and divide the sent gradient by the batch size.'
        )
    raise InputError(
        f"The gradient of the loss {function.loss_fn} in the scores is not (softmax(z) - onehot(y)) / B. {rule}"
    )


def observed_head(observation: Observation, *, needs_bias: bool) -> ClassificationHead:
    """The head of an observation's model, after every check that needs no attack.

    Raises `UnsupportedModelError` for a model without a head, or one without a bias where `needs_bias`, and
    `InputError` for a single output, another number of classes, another loss, or a head whose gradient is zero.
    """
    function = observation.loss_gradient
    head = classification_head(function, observation.input_shape)
    name = head.weight.rpartition(".")[0] or head.weight
    if head.num_classes < 2:
        raise InputError(
            f"The head {name!r} has one output; labels are restored from two classes on. Give the attacker the labels."
        )
    if observation.num_classes not in (None, head.num_classes):
        raise InputError(
            f"The observation says `num_classes={observation.num_classes}`, the head {name!r} has {head.num_classes} "
            "outputs. Give the same number, or leave it out."
        )
    if head.weight not in observation.sent:
        raise InputError(
            f"Labels are restored from the gradient of the head {name!r}, and that of {head.weight!r} was not sent. "
            'Give the attacker the labels, or attack with labels as variables (`labels="joint"`).'
        )
    if head.bias is not None and head.bias not in observation.sent:
        if needs_bias:
            raise InputError(
                f"The gradient of the head's bias, {head.bias!r}, was not sent, and iLRG divides by it. Use "
                "`LabelSystem()`, or `IDLGLabel()` for a single example."
            )
        head = replace(head, bias=None)
    if needs_bias and head.bias is None:
        raise UnsupportedModelError(
            f"The head {name!r} has no trainable bias. iLRG divides the weight's gradient by the bias's. Without one "
            "use `LabelSystem()`, or `IDLGLabel()` for a single example; or give the head a bias: "
            "`nn.Linear(..., bias=True)`."
        )
    check_cross_entropy(function, head)
    telling = head.bias if needs_bias and head.bias is not None else head.weight
    if not observation.sent[telling].any():
        raise InputError(f"The sent gradient of {telling!r} is zero everywhere: it tells nothing about the labels.")
    return head
