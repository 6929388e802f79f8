"""What every object of options keeps: frozen, keyword-only, and its repr makes it again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import torch

from gradguard.errors import InputError


def check_options(options: Any) -> None:
    """Check that `options` are a frozen, keyword-only dataclass whose repr is its constructor.

    Args:
        options: an attack, a defense, or anything else that is made from options.

    Raises:
        AssertionError: naming what is missing.
    """
    kind = type(options).__name__
    assert is_dataclass(options), f"{kind} is no dataclass"
    frozen = type(options).__dataclass_params__.frozen  # type: ignore[union-attr]
    assert frozen, f"{kind} is not frozen: `@dataclass(frozen=True, kw_only=True)`"
    loose = [f.name for f in fields(options) if f.init and not f.kw_only]
    assert not loose, f"{kind} takes {loose} by position: `@dataclass(frozen=True, kw_only=True)`"
    for option in fields(options):
        try:
            setattr(options, option.name, None)
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{kind}.{option.name} can be set")
    text = repr(options)
    assert "tensor(" not in text, f"{kind} shows tensors in its repr"
    again = eval(text, _names(options))  # the test's own objects; that this gives them back is the point
    assert again == options, f"{text} makes another one: {again!r}"


def check_refused(what: str, call: Callable[[], object]) -> None:
    """Check that `call` raises an `InputError` with a message; `what` names the wrong use."""
    message = None
    try:
        call()
    except InputError as error:
        message = str(error)
    assert message is not None, f"{what}: not refused"
    assert message, f"{what}: the refusal has no message"


def _names(options: Any) -> dict[str, Any]:
    """The names that its repr may use: its class's module's, and those of what its options hold."""
    names: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    for base in reversed(type(options).__mro__):
        module = sys.modules.get(base.__module__)
        names |= {} if module is None else vars(module)
    names[type(options).__name__] = type(options)
    for option in fields(options):
        value = getattr(options, option.name)
        for part in value if isinstance(value, tuple | list) else (value,):
            names |= _names(part) if is_dataclass(part) and not isinstance(part, type) else {}
    return names
