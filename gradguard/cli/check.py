"""`gradguard check`."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from gradguard.cli.common import reports_errors
from gradguard.cli.subject import DEFENSE_NAMES, Subject, subject_options
from gradguard.defenses import DEFENSES
from gradguard.errors import ForeignMessageError, InputError, SeededNoiseWarning
from gradguard.evaluation.datasets import in_memory
from gradguard.evaluation.differences import compare
from gradguard.functional.as_gradient import as_gradient
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.vectors import Gradient
from gradguard.functional.whole_batch import moved, take
from gradguard.storage.files import load_gradient, load_weights, save_gradient


@click.command()
@click.argument("gradient_file", type=click.Path(path_type=Path))
@subject_options
@click.option("--update", is_flag=True, help="The file holds an update (weights after - before, or before - after).")
@click.option("--learning-rate", type=float, help="With --update: of the local steps.")
@click.option("--steps", type=click.IntRange(1), help="With --update: how many local steps of SGD (default: 1).")
@click.option(
    "--local-batch-size", type=click.IntRange(1), help="With --update: examples per step, in order (default: all)."
)
@click.option("--momentum", type=float, default=0.0, show_default=True, help="With --update: of the local SGD.")
@click.option(
    "--weight-decay", type=float, default=0.0, show_default=True, help="Of the local SGD, or in the gradient."
)
@click.option(
    "--proximal",
    type=float,
    help="The factor mu of FedProx's term mu / 2 * |weights - start|^2 in the local loss, or in the gradient.",
)
@click.option(
    "--proximal-start",
    type=click.Path(path_type=Path),
    help="With --proximal: its start, as safetensors (default: the model's weights; a gradient needs the file).",
)
@click.option("--declared", type=click.Choice(DEFENSE_NAMES), help="The file went through this defense already.")
@click.option("--declared-strength", type=float, default=0.5, show_default=True, help="Of that defense.")
@click.option("--partial", is_flag=True, help="Parameters that the file lacks are not sent (default: an error).")
@click.option(
    "--max-unexplained",
    type=float,
    default=0.05,
    show_default=True,
    help="Refuse a file that differs by more of its norm from the gradient of these data at these weights.",
)
@click.option("--no-verify", is_flag=True, help="Judge by the closed-form measures alone, without attacking.")
@click.option("--write", type=click.Path(path_type=Path), help="Write what may be sent to this safetensors file.")
@reports_errors
def check(
    gradient_file: Path,
    update: bool,
    learning_rate: float | None,
    steps: int | None,
    local_batch_size: int | None,
    momentum: float,
    weight_decay: float,
    proximal: float | None,
    proximal_start: Path | None,
    declared: str | None,
    declared_strength: float,
    partial: bool,
    max_unexplained: float,
    no_verify: bool,
    write: Path | None,
    as_json: bool,
    **subject: Any,
) -> None:
    """May this gradient (safetensors) be sent? Exit code 0: yes, or the perturbed one was written; 1: no.

    2: it is not the gradient, or the declared update, of these data at these weights.
    """
    gradient = load_gradient(gradient_file)
    training = local_training(
        update,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=local_batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    source = click.get_current_context().get_parameter_source("batch_size")
    case = Subject(**subject, whole=source == click.core.ParameterSource.DEFAULT)
    term = proximal_term(case, proximal, proximal_start, update)
    if term is not None:
        training = replace(training or LocalTraining(steps=1, learning_rate=1.0), regulariser=term)
    with warnings.catch_warnings(), told_where_to_look(case, gradient, subject):
        warnings.simplefilter("ignore", SeededNoiseWarning)  # said above, once, on standard error
        sent, verdict = case.guard.protect(
            case.model,
            case.loss_fn,
            case.inputs,
            case.targets,
            gradient,
            training=training,
            declared=DEFENSES[declared].make(declared_strength) if declared else None,
            missing="unsent" if partial else "error",
            foreign=max_unexplained,
            verify=not no_verify,
            generator=case.generator,
            noise=case.noise,
        )
    if write is not None and sent is not None:
        save_gradient(write, sent)
    fine = verdict.decision == "send" or (verdict.decision == "perturb" and write is not None)
    if as_json:
        decision = {
            "decision": verdict.decision,
            "reasons": verdict.reasons,
            "measures": verdict.measures,
            "noise_ratio": verdict.noise_ratio,
            "looks_like": verdict.looks_like,
            "explanation": verdict.explanation,
            "examples": case.size,
        }
        click.echo(json.dumps(decision | {"written": str(write) if write and sent is not None else None}))
    else:
        click.echo(f"{verdict.decision}: " + "; ".join(verdict.reasons))
        click.echo(f"Noise ratio {verdict.noise_ratio:.3g} (noise over gradient), {case.size} examples.")
        if verdict.decision == "perturb" and write is None:
            click.echo("Do not send the gradient as it is; --write FILE saves the perturbed one.")
    sys.exit(0 if fine else 1)


def local_training(
    update: bool,
    *,
    learning_rate: float | None,
    steps: int | None,
    batch_size: int | None,
    momentum: float,
    weight_decay: float,
) -> LocalTraining | None:
    """What the options of `check` say of how the client trained; `None`: the file holds a plain gradient."""
    if not update:
        given = {"--learning-rate": learning_rate, "--steps": steps, "--local-batch-size": batch_size}
        wrong = [option for option, value in given.items() if value is not None] + ["--momentum"] * bool(momentum)
        if wrong:
            raise InputError(f"`{wrong[0]}` describes an update: it goes with `--update`.")
        return LocalTraining(steps=1, learning_rate=1.0, weight_decay=weight_decay) if weight_decay else None
    if learning_rate is None and (steps or 1) > 1:
        raise InputError(f"An update of {steps} steps depends on its learning rate: give `--learning-rate`.")
    return LocalTraining(
        steps=steps or 1,
        learning_rate=1.0 if learning_rate is None else learning_rate,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
    )


def proximal_term(
    case: Subject, factor: float | None, start: Path | None, update: bool
) -> Callable[[Gradient], Tensor] | None:
    """FedProx's term (Li et al. 2020, Eq. 2) as a function of the parameters; `None` without one."""
    if factor is None:
        if start is not None:
            raise InputError("`--proximal-start` is where `--proximal` starts from: give both.")
        return None
    if not 0 < factor < float("inf"):
        raise InputError(f"`--proximal` must be a positive number, got {factor}.")
    if start is None and not update:
        raise InputError(
            "FedProx's term has no gradient where it starts, so a gradient that holds one is of other weights than its "
            "start: give `--proximal-start`, the weights of the round's beginning, or `--update`."
        )
    at = case.model
    if start is not None:
        at = copy.deepcopy(case.model)
        load_weights(start, at)
    fixed = {n: p.detach() for n, p in at.named_parameters()}

    def term(parameters: Gradient) -> Tensor:
        squares = [(p - fixed[n].to(p)).square().sum() for n, p in parameters.items()]
        return factor / 2 * torch.stack(squares).sum()

    return term


@contextmanager
def told_where_to_look(case: Subject, gradient: dict[str, Tensor], subject: dict[str, Any]) -> Iterator[None]:
    """A message that is not of these data at these weights is refused with what on the command line may be wrong."""
    try:
        yield
    except ForeignMessageError as error:
        raise InputError(f"{error} {where_to_look(case, gradient, subject)}") from error


def where_to_look(case: Subject, gradient: dict[str, Tensor], subject: dict[str, Any]) -> str:
    """What the command line makes likely where a message is not of its batch."""
    if case.size < case.count and is_of_all(case, gradient):
        return f"It is the gradient of all {case.count} examples of {subject['data']}: leave `--batch-size` out."
    if subject["weights"] is None:
        weights = "No `--weights` were given: the model is as its factory draws it, which is hardly what it was."
    else:
        weights = f"The weights are those of {subject['weights']}: are they of the round that the message is of?"
    return f"{weights} The data are {case.size} of the {case.count} examples of {subject['data']}."


def is_of_all(case: Subject, gradient: dict[str, Tensor]) -> bool:
    """Whether a message is a multiple of the gradient of all the data, where they are in memory."""
    held = in_memory(case.examples())
    if held is None:
        return False
    device = next(case.model.parameters()).device
    function, inputs, targets = take(
        case.guard.loss_gradient(case.model, case.loss_fn), *(moved(part, device) for part in held)
    )
    given = as_gradient(case.model, gradient, missing="unsent")
    return compare(function(inputs, targets), given).distance <= 0.02
