"""Options of attacks, checked when they are given."""

from __future__ import annotations

from numbers import Integral, Real

from gradguard.errors import InputError


def check_whole(least: int, **values: object) -> None:
    """Raise `InputError` for an option that is no whole number, or below `least`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InputError(f"`{name}` must be a whole number, got {value!r}.")
        if int(value) < least:
            rule = "must not be negative" if least == 0 else f"must be at least {least}"
            raise InputError(f"`{name}` {rule}, got {value}.")


def check_numbers(**values: object) -> None:
    """Raise `InputError` for an option that is no number; what range it must be in is asked elsewhere."""
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise InputError(f"`{name}` must be a number, got {value!r}.")
