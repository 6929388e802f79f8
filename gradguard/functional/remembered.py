"""Answers about a model that cost a pass through it and hold for as long as its modules stay what they are."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from gradguard.functional.loss_gradient import LossGradient

Answer = TypeVar("Answer")

_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[tuple, object]]] = weakref.WeakKeyDictionary()


def remembered(gradient: LossGradient, question: Hashable, find: Callable[[], Answer]) -> Answer:
    """`find()`, or what it said last time about the same question, loss and model.

    The same model: the same modules in the same modes, with the same parameter objects trained.

    Args:
        gradient: The model and the loss.
        question: What is asked, as a key.
        find: Finds the answer. It must not depend on parameter values or on the computing dtype, which may have changed
            by the next time.

    Returns:
        The answer.
    """
    signature = (_weak(gradient.loss_fn), gradient.train_mode, gradient.input_module, *_structure(gradient.model))
    answers = _known.setdefault(gradient.model, {})
    if question not in answers or answers[question][0] != signature:
        answers[question] = (signature, find())
    return answers[question][1]  # type: ignore[return-value]


def _weak(function: Any) -> Any:
    """A reference that keeps nothing alive: a loss that is a method of the model would keep the model."""
    try:
        return weakref.WeakMethod(function) if inspect.ismethod(function) else weakref.ref(function)
    except TypeError:
        return function


def _structure(model: nn.Module) -> list[tuple]:
    return [
        (type(m), m.training, *((n, id(p), p is None or p.requires_grad) for n, p in m._parameters.items()))
        for m in model.modules()
    ]
