"""`gradguard audit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gradguard.cli.common import reports_errors
from gradguard.cli.subject import Subject, subject_options
from gradguard.errors import InputError
from gradguard.storage.files import write_text
from gradguard.survey import YARDSTICK, survey


@click.command()
@subject_options
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Measure every example of the data by itself, without attacks: who is exposed, class by class.",
)
@click.option("--examples", type=click.IntRange(1), help="The same for the first so many examples.")
@click.option(
    "--exact", is_flag=True, help="With --all or --examples: the predicted error itself, not only its lower bound."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the HTML page and its pictures to this folder (private: they show reconstructions). With --all or "
    "--examples: page, figure, numbers, and what is measured so far, from which the same command goes on.",
)
@reports_errors
def audit(
    everything: bool, examples: int | None, exact: bool, output: Path | None, as_json: bool, **subject: Any
) -> None:
    """What the gradient of a batch gives away: measures, attacks, verdict. With --all: of every example of the data."""
    case = Subject(**subject)
    if everything or examples is not None:
        if everything and examples is not None:
            raise InputError(f"Give `--all` or `--examples {examples}`, not both.")
        source = click.get_current_context().get_parameter_source("batch_size")
        chunk = None if source == click.core.ParameterSource.DEFAULT else subject["batch_size"]
        survey_of(case, output, as_json, examples=examples, exact=exact, batch_size=chunk)
        return
    if exact:
        raise InputError("`--exact` goes with --all or --examples; the audit of a batch is exact.")
    report = case.guard.audit(
        case.model,
        case.loss_fn,
        case.inputs,
        case.targets,
        class_names=case.class_names,
        generator=case.generator,
        noise=case.noise,
    )
    if output is not None:
        report.save_html(output / "index.html")
        write_text(output / "report.json", report.to_json())
    if as_json:
        click.echo(report.to_json())
    else:
        report.print()
        if output is not None:
            click.echo(f"\nThe report with pictures: {output / 'index.html'}")


def survey_of(case: Subject, output: Path | None, as_json: bool, **options: Any) -> None:
    """`gradguard audit --all`: measure, write, print."""
    checkpoint = output / "survey.safetensors" if output is not None else None
    try:
        found = survey(
            case.model,
            case.loss_fn,
            case.examples(),
            defense=case.guard.defense or YARDSTICK,
            checkpoint=checkpoint,
            seed=case.seed,
            class_names=case.class_names,
            value_range=case.guard.threat.value_range,
            input_module=case.guard.input_module,
            private=case.guard.private,
            **options,
        )
    except KeyboardInterrupt:
        kept = f"; the same command goes on from what {checkpoint} holds" if checkpoint and checkpoint.exists() else ""
        click.echo(f"gradguard: stopped{kept}.", err=True)
        sys.exit(130)
    if output is not None:
        found.save_html(output / "index.html")
        write_text(output / "survey.json", found.to_json())
    if as_json:
        click.echo(found.to_json())
    else:
        found.print()
        if output is not None:
            click.echo(f"\nThe page, the figure and the numbers: {output}")
