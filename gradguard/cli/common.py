"""What all commands share: options as a group, and errors as one line and an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from gradguard.errors import InputError


def reports_errors(command: Callable) -> Callable:
    """An `InputError` becomes one line on standard error (or in the JSON) and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            command(*args, as_json=as_json, **kwargs)
        except InputError as error:
            if as_json:
                click.echo(json.dumps({"error": str(error)}))
            click.echo(f"gradguard: {error}", err=True)
            sys.exit(2)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(wrapped)


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate
