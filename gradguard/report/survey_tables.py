"""A survey as tables on a terminal, readable from 80 columns on."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradguard.report import summaries as s
from gradguard.report.survey_report import Survey
from gradguard.report.tables import WORST, _note, _table, _text, _title

#: Rows of the table of classes: the most exposed ones. The JSON has them all.
CLASS_ROWS = 20
#: Rows of the table of examples.
EXAMPLE_ROWS = 5
MEASURES = {"predicted_error": "predicted error (I2F)", "lower_bound": "lower bound of the predicted error (I2F)"}


def print_survey(survey: Survey, console: Console | None = None) -> None:
    """Print summary, classes and the most exposed examples. `console`: where to; standard output by default."""
    parts = [part for section in (_summary, _classes, _examples) for part in (*section(survey), Text())]
    (console or Console()).print(Group(*parts[:-1]))


def survey_words(survey: Survey) -> list[str]:
    """The findings as sentences: who is most exposed, which class, how far examples lie apart."""
    worst, rows = survey.worst(1)[0], survey.per_class()
    size = survey.per_element[worst.index].item()
    error = survey.error[worst.index].item()
    least = "" if survey.exact else "at least "
    words = [
        f"Example {worst.index} (class {worst.name}) is the most exposed: {least}{s.number(error)}, or "
        f"{s.number(size)} per element."
    ]
    if len(rows) > 1:
        low = min(rows, key=lambda row: row.median)
        mean = survey.error.mean().item()
        words.append(
            f"Class {rows[0].name} has it; class {low.name} has the lowest median, {s.number(low.median)}."
            if low.label != rows[0].label
            else f"Class {low.name} has it, and the lowest median, {s.number(low.median)}."
        )
        words.append(f"The mean over all examples, {s.number(mean)}, is {s.number(mean / error)} times the worst.")
    if survey.spread == survey.spread:
        words.append(f"The least exposed example's is {s.number(survey.spread)} times the most exposed one's.")
    if not survey.exact:
        words.append(
            "These are lower bounds: predicted errors can be far larger, and in another order. Solve for them to know."
        )
    hidden = int(survey.error.isinf().sum())
    if hidden:
        words.append(f"{s.count(hidden, 'example')} left no trace in the gradient (infinite error).")
    missed = int((~survey.converged).sum())
    if missed:
        words.append(f"{s.count(missed, 'value')} did not converge: {_unconverged_words(survey)}.")
    if not survey.complete:
        words.append(f"The pass was stopped after {s.count(len(survey), 'example')}.")
    return words


def _unconverged_words(survey: Survey) -> str:
    return "the predicted error is larger" if survey.exact else "those bounds are rougher than they could be"


def _summary(survey: Survey) -> Iterable[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    shape = "×".join(map(str, survey.input_shape))
    facts.add_row("model", _text(f"{survey.model}, on {s.count(len(survey), 'example')} of {shape}"))
    facts.add_row("noise", _text(survey.defense))
    facts.add_row("measure", f"{MEASURES[survey.measure]}, input units; small is bad")
    for number, sentence in enumerate(survey_words(survey)):
        facts.add_row("" if number else "findings", _text(sentence, style=WORST if number == 0 else ""))
    yield Text("gradguard survey", style="bold")
    yield facts


def _classes(survey: Survey) -> Iterable[RenderableType]:
    rows = survey.per_class()
    yield _title("Per class", "the class with the most exposed example first; # = that example")
    table = _table(
        ("class", "left"),
        ("examples", "right"),
        ("worst", "right"),
        ("#", "left"),
        ("5%", "right"),
        ("median", "right"),
        ("lambda_max", "right"),
    )
    table.columns[0].min_width = 8
    steepest = {row.label: row.worst for row in survey.per_class("lambda_max")}
    for place, row in enumerate(rows[:CLASS_ROWS]):
        values = (row.quantiles[0.05], row.median, steepest[row.label])
        texts = (str(row.count), s.number(row.worst), f"#{row.worst_example}", *(s.number(v) for v in values))
        table.add_row(_text(row.name), *texts, style=None if place else WORST)
    if len(rows) > 1:
        quantiles = survey.quantiles()
        overall = (quantiles[0.05], quantiles[0.5], survey.lambda_max.max().item())
        texts = (str(len(survey)), s.number(quantiles[0.0]), "", *(s.number(v) for v in overall))
        table.add_row("all", *texts, style="dim")
    yield table
    if len(rows) > CLASS_ROWS:
        yield _note(f"Classes left out because they are less exposed: {len(rows) - CLASS_ROWS}. The JSON has them all.")


def _examples(survey: Survey) -> Iterable[RenderableType]:
    yield _title("Most exposed examples", "")
    table = _table(("example", "left"), ("class", "left"), ("error", "right"), ("per element", "right"))
    for name in ("lambda_max", "|g|", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in survey.worst(EXAMPLE_ROWS):
        values = (
            survey.error[row.index].item(),
            survey.per_element[row.index].item(),
            row.lambda_max,
            row.gradient_norm,
            row.loss,
        )
        error, *rest = (s.number(v) for v in values)
        table.add_row(f"#{row.index}", _text(row.name), error if row.converged else error + "*", *rest)
    yield table
