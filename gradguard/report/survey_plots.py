"""A survey as a matplotlib figure."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradguard.report import summaries as s
from gradguard.report.survey_report import Survey
from gradguard.report.survey_tables import MEASURES
from gradguard.report.theme import (
    FONT,
    LIGHT,
    WIDTH,
    Theme,
    note_style,
    set_text,
    short,
    sparse_log_ticks,
    style_axes,
    title_style,
)

#: Classes drawn: the most exposed ones.
CLASSES = 20
#: Most examples drawn as dots, over all classes; beyond, every n-th of each class and the worst.
DOTS = 4000


def plot_survey(survey: Survey, *, theme: Theme = LIGHT) -> Figure:
    """The error per class, and all examples from the most to the least exposed. Errors in input units, log axis.

    Left: a dot per example, a bar from the 5% to the 95% quantile with the median, the worst example ringed.

    Args:
        survey: What to draw.
        theme: Colours.

    Returns:
        One figure.
    """
    rows = survey.per_class()[:CLASSES]
    figure = Figure(figsize=(WIDTH, max(3.4, 1.6 + 0.26 * len(rows))), layout="constrained", facecolor=theme.background)
    figure.suptitle("Who is exposed, class by class", **title_style(theme))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_classes(left, survey, theme)
    _draw_curve(right, survey, theme)
    return figure


def _draw_classes(axes: Axes, survey: Survey, theme: Theme) -> None:
    rows = survey.per_class()[:CLASSES]
    errors, labels = survey.error.numpy(), survey.label.numpy()
    step = max(1, -(-len(errors) // DOTS))
    for lane, row in enumerate(rows):
        values = _drawable(errors[labels == row.label])
        if not len(values):
            continue
        dots = np.sort(values)[::step]
        # The golden ratio spreads neighbours evenly over the lane: no random numbers, the same figure every time.
        lanes = lane + 0.5 * ((np.arange(len(dots)) * 0.618034) % 1 - 0.5)
        axes.plot(dots, lanes, "o", color=theme.with_, markersize=2.5, alpha=0.35, markeredgewidth=0, zorder=2)
        low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
        axes.plot([low, high], [lane, lane], color=theme.ink, linewidth=1.4, zorder=3)
        axes.plot([median], [lane], "|", color=theme.ink, markersize=11, markeredgewidth=2, zorder=4)
        worst: dict[str, Any] = {
            "color": theme.worst,
            "markerfacecolor": "none",
            "markersize": 7,
            "markeredgewidth": 1.6,
        }
        axes.plot([values.min()], [lane], "o", zorder=5, **worst)
    _log_axis(axes, errors, "x")
    style_axes(axes, theme, f"{MEASURES[survey.measure]}, input units", "")
    sparse_log_ticks(axes)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)))
    set_text(axes.set_yticklabels, [short(row.name, 18) for row in rows], color=theme.ink, size=9)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    hint = "dots: examples; bar: 5% to 95%, median; ring: the most exposed of the class"
    axes.set_title(hint, loc="left", color=theme.muted, fontsize=8, fontfamily=FONT)


def _draw_curve(axes: Axes, survey: Survey, theme: Theme) -> None:
    errors = survey.error.numpy()
    known = np.sort(_drawable(errors))
    worst = survey.worst(1)[0]
    if len(known):
        share = 100 * (np.arange(len(known)) + 1) / len(errors)
        axes.plot(share, known, color=theme.with_, linewidth=1.6, drawstyle="steps-post")
        axes.plot(share[:1], known[:1], "o", color=theme.worst, markersize=6)
        axes.axhline(known.mean(), color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        offset = {"textcoords": "offset points", "xytext": (8, -2)}
        note = f"#{worst.index}, class {short(worst.name, 16)}: {s.number(float(known[0]))}"
        axes.annotate(note, xy=(share[0], known[0]), **offset, **note_style(theme.worst, va="top"))  # type: ignore[arg-type]
        axes.annotate(
            f"mean {s.number(float(known.mean()))}",
            xy=(1, known.mean()),
            xytext=(2, 3),
            textcoords="offset points",
            **note_style(theme.muted, va="bottom"),
        )
    _log_axis(axes, errors, "y")
    style_axes(axes, theme, "share of the examples, % (most exposed first)", "")
    sparse_log_ticks(axes)
    axes.set_xlim(-2, 102)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)


def _log_axis(axes: Axes, errors: np.ndarray, which: str) -> None:
    values = _drawable(errors)
    if not len(values):
        return
    limits = (values.min() / 1.5, values.max() * 1.3)
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})


def _drawable(errors: np.ndarray) -> np.ndarray:
    """What a log axis can show."""
    return errors[np.isfinite(errors) & (errors > 0)]
