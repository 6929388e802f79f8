"""The report as tables on a terminal, readable from 80 columns on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradguard.report import summaries as s
from gradguard.report.leakage_report import LeakageReport

DECISION_STYLES = {"send": "bold green", "perturb": "bold yellow", "block": "bold red", "unproven": "bold red"}
WORST = "bold magenta"
#: Most rows of the influence check and of the label counts that are printed; the page and the JSON have them all.
ROWS = 16


def print_report(report: LeakageReport, console: Console | None = None) -> None:
    """Print every section that `report` has. `console`: where to; standard output by default."""
    (console or Console()).print(report_tables(report))


def report_tables(report: LeakageReport) -> Group:
    """The sections of `report` as rich renderables. Names from outside are plain text: no markup in them acts."""
    sections = (_summary, _attacks, _predicted_errors, _classes, _labels, _influence_check)
    parts: list[RenderableType] = []
    for section in sections:
        rendered = list(section(report))
        if rendered:
            parts += [*rendered, Text()]
    return Group(*parts[:-1])


# ---------------------------------------------------------------------- sections


def _summary(report: LeakageReport) -> Iterable[RenderableType]:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row(
        "model", _text(f"{report.model}, on {s.count(len(report.labels), 'example')} of {s.shape_words(report)}")
    )
    if report.defense is None:
        sent = (
            f"; what is sent differs by {s.percent(report.noise_ratio)}"
            if len(s.cases(report)) == 2
            else ": the gradient as it is"
        )
        facts.add_row("defense", f"none{sent}")
    else:
        facts.add_row(
            "defense",
            _text(f"{report.defense}, noise {s.percent(report.noise_ratio)} of |g| = {s.number(report.gradient_norm)}"),
        )
    if words := s.accuracy_words(report):
        facts.add_row("accuracy", words)
    if exposed := s.exposure(report):
        facts.add_row("most exposed", _text(exposed, style=WORST))
    if report.verdict is None:
        facts.add_row("verdict", "none: no policy was given")
    else:
        facts.add_row("verdict", Text(report.verdict.decision.upper(), style=DECISION_STYLES[report.verdict.decision]))
        reasons = Table.grid(padding=(0, 1))
        for reason in report.verdict.reasons:
            reasons.add_row("-", _text(s.sentence(reason)))
        facts.add_row("", reasons)
    yield Text("gradguard leakage report", style="bold")
    yield facts


def _attacks(report: LeakageReport) -> Iterable[RenderableType]:
    rows = s.attack_rows(report)
    if not rows:
        return
    yield _title("What attacks get", "PSNR in dB; worst = the most exposed example, #")
    table = _table(
        ("attack", "left"), ("PSNR", "right"), ("worst", "right"), ("#", "left"), ("SSIM", "right"), ("worst", "right")
    )
    table.add_column("converged", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for attack, group in groupby(rows, key=lambda row: row.attack):
        ran = [row for row in group if row.failure is None]
        if ran:
            table.add_row(_text(attack, style="bold"))
        for row in ran:
            table.add_row(
                "  " + s.case_words(report, row.case),
                s.decibels(row.mean_psnr),
                Text(s.decibels(row.worst_psnr), style=WORST),
                "" if row.worst_example is None else f"#{row.worst_example}",
                s.hundredths(row.mean_ssim),
                s.hundredths(row.worst_ssim),
                s.percent(row.converged),
                s.duration(row.seconds),
            )
    if table.row_count:
        yield table
    for failure in s.failures(report):
        yield _note(failure, style="red")
    if report.prior_psnr is not None:
        yield _note(f"Guessing the average picture, from no gradient at all, gets {s.decibels(report.prior_psnr)} dB.")


def _predicted_errors(report: LeakageReport) -> Iterable[RenderableType]:
    rows = s.error_rows(report)
    if not rows:
        return
    yield _title("Predicted error", "of gradient matching, in input units; small = exposed")
    folded = len(report.predicted_error) > s.FOLD_ABOVE
    heading = f"of {len(report.predicted_error)} examples" if folded else "example"
    table = _table(
        (heading, "left"), ("I2F", "right"), ("per element", "right"), ("lower bound", "right"), ("lambda_max", "right")
    )
    for row in rows:
        error = s.number(row.error) if row.converged else s.number(row.error) + "*"
        values = (error, s.number(row.rms), s.number(row.lower_bound), s.number(row.lambda_max))
        table.add_row(_text(row.name), *values, style=WORST if row.worst else None)
    yield table
    if missed := s.unconverged(report):
        star = "" if folded else "* "
        yield _note(
            f"{star}{s.count(missed, 'prediction')} did not converge: the predicted error is larger.", style="yellow"
        )


def _classes(report: LeakageReport) -> Iterable[RenderableType]:
    rows = s.class_rows(report)
    if not rows:
        return
    yield _title("Most exposed classes", "by their lowest predicted error")
    table = _table(("class", "left"), ("examples", "right"), ("lowest", "right"), ("median", "right"))
    for index, row in enumerate(rows):
        style = None if index else WORST
        table.add_row(_text(row.name), str(row.examples), s.number(row.lowest), s.number(row.median), style=style)
    yield table


def _labels(report: LeakageReport) -> Iterable[RenderableType]:
    rows = s.label_rows(report)
    if not rows:
        return
    yield _title("Label recovery", "shares in [0, 1]; 1 = every label known")
    table = _table(("gradient", "left"), ("LeAcc", "right"), ("LnAcc", "right"), ("IRec", "right"))
    for case, score in rows:
        table.add_row(s.case_words(report, case), *(s.fraction(v) for v in (score.le_acc, score.ln_acc, score.i_rec)))
    yield table
    empty = s.empty_guess(rows[0][1])
    if empty:
        yield _note(
            f'LeAcc and LnAcc count absent classes: answering "no example of any" already gets {empty:.3f}. Read IRec.'
        )


def _influence_check(report: LeakageReport) -> Iterable[RenderableType]:
    rows = s.influence_rows(report)
    if not rows:
        return
    yield _title("Prediction against attack", "I2F beside an attack's error, input units")
    table = _table(
        ("perturbation", "left"), ("example", "left"), ("predicted", "right"), ("observed", "right"), ("miss", "right")
    )
    table.columns[0].overflow = "fold"
    for row in rows[:ROWS]:
        miss = f"{100 * s.prediction_miss(row):+.0f}%" if row["in_range"] else "out of range"
        example = f"#{row['example']}"
        values = (example, s.number(row["predicted"]), s.number(row["observed"]), miss)
        table.add_row(_text(row["perturbation"]), *values, style=None if row["in_range"] else "dim")
    yield table
    yield _note(s.influence_words(report))
    if len(rows) > ROWS:
        yield _note(f"{s.count(len(rows) - ROWS, 'more row')} in the page and in the JSON.")


# ---------------------------------------------------------------------- looks


def _text(text: str, style: str = "") -> Text:
    """Text from outside, as it is: no markup, and no escape sequences that would steer the terminal."""
    return Text("".join(c if c.isprintable() else "?" for c in text), style=style)


def _title(title: str, hint: str) -> Text:
    return Text.assemble((title, "bold"), ("  " + hint, "dim"))


def _note(text: str, style: str = "dim") -> Padding:
    return Padding(_text(text, style=style), (0, 0, 0, 1))


def _table(*columns: tuple[str, str]) -> Table:
    """A table of (heading, justification) columns whose first may wrap and whose numbers never do."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, header_style="dim")
    for index, (heading, justify) in enumerate(columns):
        table.add_column(heading, justify=justify, no_wrap=index > 0, overflow="fold")  # type: ignore[arg-type]
    return table
