"""A survey as one HTML page that needs nothing else. It has no pictures of examples."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from gradguard.errors import InputError
from gradguard.report.html import template
from gradguard.report.survey_plots import plot_survey
from gradguard.report.survey_report import Survey
from gradguard.report.survey_tables import MEASURES, survey_words
from gradguard.report.theme import DARK, LIGHT, Theme
from gradguard.storage.files import atomic_path, write_text

#: Rows of the table of examples on the page.
EXAMPLE_ROWS = 20


def save_survey_html(survey: Survey, path: str | Path) -> Path:
    """Write `survey` as one page to `path` and its figure as `survey.png` beside it, atomically, with mode 0600."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"`path` must name a file, and {str(path)!r} is a folder; try {str(path / 'index.html')!r}.")
    page = render_survey_html(survey)
    with atomic_path(path.parent / "survey.png") as temporary:
        temporary.write_bytes(_png(survey, LIGHT))
    write_text(path, page)
    return path


def render_survey_html(survey: Survey) -> str:
    """The page itself. Every name in it is escaped; it loads nothing and runs nothing."""
    figures = {
        name: base64.b64encode(_png(survey, theme)).decode() for name, theme in (("light", LIGHT), ("dark", DARK))
    }
    return template("survey.html.j2").render(
        survey=survey,
        light=LIGHT,
        dark=DARK,
        figures=figures,
        words=survey_words(survey),
        measure=MEASURES[survey.measure],
        classes=survey.per_class(),
        steepest={row.label: row.worst for row in survey.per_class("lambda_max")},
        examples=[
            (row, survey.error[row.index].item(), survey.per_element[row.index].item())
            for row in survey.worst(EXAMPLE_ROWS)
        ],
    )


def _png(survey: Survey, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    plot_survey(survey, theme=theme).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
