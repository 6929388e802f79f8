"""The report as matplotlib figures. Each function returns a `Figure` of its own: no pyplot, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from gradguard.report import summaries as s
from gradguard.report.leakage_report import LeakageReport
from gradguard.report.pictures import (
    draw_reconstructions,
    reconstruction_rows,
    reconstructions_height,
    reconstructions_width,
)
from gradguard.report.theme import (
    DARK,
    FONT,
    LIGHT,
    MARKS,
    WIDTH,
    Theme,
    note_style,
    set_text,
    short,
    sparse_log_ticks,
    style_axes,
    title_style,
)

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "plot_attacks",
    "plot_influence_check",
    "plot_reconstructions",
    "plot_report",
    "plot_spectrum",
]

#: What a title adds to a figure's height, in inches.
TITLE = 0.35
#: PSNR (dB) beyond which an axis does not follow: rounding a picture to 8 bits alone is 59 dB from it.
TOP_PSNR = 60.0
#: Below this share of the largest eigenvalue a spectrum is rounding noise and is not drawn.
SPECTRUM_FLOOR = 1e-16


@dataclass(frozen=True)
class Part:
    """One section: its title, how to draw it, its height in inches, whether the report has anything for it, what to
    say if not, and its width in inches where it stands alone."""

    title: str
    draw: Callable[[SubFigure | Figure, LeakageReport, Theme], None]
    height: Callable[[LeakageReport], float]
    applies: Callable[[LeakageReport], bool]
    missing: str
    width: Callable[[LeakageReport], float] = lambda report: WIDTH


def plot_reconstructions(report: LeakageReport, *, theme: Theme = LIGHT) -> Figure:
    """The originals, and below them what each attack got without and with the defense, PSNR (dB) under each.

    Pictures (`(H, W)`, `(1 | 3, H, W)`) are clamped to their value range for display; other inputs are
    drawn as lines over the original's. More than `pictures.COLUMNS` examples: the most exposed ones.

    Args:
        report: What to draw.
        theme: Colours.

    Returns:
        One figure.
    """
    return draw_part(report, RECONSTRUCTIONS, theme)


def plot_spectrum(report: LeakageReport, *, theme: Theme = LIGHT) -> Figure:
    """Eigenvalues of `J J^T` on a log axis, one line per example, the most exposed one highlighted."""
    return draw_part(report, SPECTRUM, theme)


def plot_attacks(report: LeakageReport, *, theme: Theme = LIGHT) -> Figure:
    """PSNR (dB) of every attacked example per attack, without and with the defense, and `prior_psnr` as a line."""
    return draw_part(report, ATTACKS, theme)


def plot_influence_check(report: LeakageReport, *, theme: Theme = LIGHT) -> Figure:
    """Predicted (I2F) against observed errors, input units, log-log, with the band of `summaries.BAND`.

    Predictions outside the range in which the first order holds are hollow.

    Args:
        report: What to draw.
        theme: Colours.

    Returns:
        One figure.
    """
    return draw_part(report, INFLUENCE, theme)


def plot_report(report: LeakageReport, *, theme: Theme = LIGHT) -> Figure:
    """Every section that the report has something for, as one figure."""
    parts = [part for part in PARTS.values() if part.applies(report)] or [SPECTRUM]
    if len(parts) == 1:
        return draw_part(report, parts[0], theme)
    heights = [part.height(report) + TITLE for part in parts]
    figure = _empty_figure(WIDTH, sum(heights), theme)
    places = figure.subfigures(len(parts), 1, height_ratios=heights)
    for part, place in zip(parts, np.asarray(places).flat, strict=True):
        place.set_facecolor(theme.background)
        place.suptitle(part.title, **title_style(theme))
        part.draw(place, report, theme)
    return figure


def draw_part(report: LeakageReport, part: Part, theme: Theme = LIGHT, *, titled: bool = True) -> Figure:
    """One of `PARTS` as a figure; `titled` off where the page around it has the title."""
    if not part.applies(report):
        figure = _empty_figure(WIDTH, 1.2, theme)
        figure.text(0.5, 0.5, part.missing, ha="center", va="center", color=theme.muted, fontsize=10, fontfamily=FONT)
        return figure
    figure = _empty_figure(part.width(report), part.height(report) + TITLE * titled, theme)
    if titled:
        figure.suptitle(part.title, **title_style(theme))
    part.draw(figure, report, theme)
    return figure


def _empty_figure(width: float, height: float, theme: Theme) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07, hspace=0.02)  # type: ignore[union-attr, call-arg]
    return figure


# ---------------------------------------------------------------------- spectrum


def _draw_spectrum(figure: SubFigure | Figure, report: LeakageReport, theme: Theme) -> None:
    axes = figure.add_subplot()
    worst = s.most_exposed(report)
    lines = [(index, np.asarray(values, dtype=float)) for index, values in enumerate(report.spectrum)]
    longest = max(len(values) for _, values in lines)
    others = 0
    for index, values in lines:
        floor = SPECTRUM_FLOOR * np.nanmax(values, initial=0)
        known = np.where(np.isfinite(values) & (values > floor), values, np.nan)
        if np.isnan(known).all():
            continue
        style: dict[str, Any] = {"marker": "o", "markersize": 2.5} if np.isfinite(known).sum() < 40 else {}
        if index == worst:
            axes.plot(np.arange(1, len(known) + 1), known, color=theme.worst, linewidth=2, zorder=3, **style)
        else:
            others += 1
            alpha = max(0.25, min(0.7, 6 / len(lines)))
            axes.plot(np.arange(1, len(known) + 1), known, color=theme.with_, linewidth=1, alpha=alpha, **style)
    axes.set_yscale("log")
    size = math.prod(report.input_shape)
    extent = f"all {size}" if longest >= size else f"the leading {longest} of {size}"
    style_axes(axes, theme, f"direction in input space, most visible first ({extent})", "eigenvalue of J Jᵀ")
    sparse_log_ticks(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    # Spectra fall: the upper right corner is free.
    notes = []
    if worst is not None and worst < len(lines):
        notes.append((s.example_name(report, worst) + (", the most exposed" if others else ""), theme.worst))
    if others:
        notes.append((f"the other {s.count(others, 'example')}" if notes else s.count(others, "example"), theme.with_))
    for row, (note, color) in enumerate(notes):
        axes.annotate(
            short(note, 60),
            xy=(1, 1),
            xycoords="axes fraction",
            xytext=(-8, -8 - 15 * row),
            textcoords="offset points",
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1},
            **note_style(color, ha="right", va="top"),
        )


# ---------------------------------------------------------------------- attacks


def _draw_attacks(figure: SubFigure | Figure, report: LeakageReport, theme: Theme) -> None:
    axes = figure.add_subplot()
    rows = [row for row in s.attack_rows(report) if row.failure is None]
    names = list(dict.fromkeys(row.attack for row in rows))
    known = [p for row in rows for p in report.attacks[row.attack][row.case].psnr if math.isfinite(p)]
    marks = [*known, *([report.prior_psnr] if report.prior_psnr is not None else []), s.RECOGNISABLE_PSNR]
    low, high = min(*marks, 5.0) - 2, min(max(marks), TOP_PSNR) + 4
    for row in rows:
        lane = float(names.index(row.attack))
        if len(s.cases(report)) == 2:
            lane += -0.19 if row.case == "without" else 0.19
        # What is beyond the axis, exact reconstructions with them, stands at its right edge; the label has the number.
        scores = np.asarray(report.attacks[row.attack][row.case].psnr, dtype=float)
        psnr = np.minimum(scores[~np.isnan(scores)], high)
        best, mean, color = psnr.max(), psnr.mean(), theme.case(row.case)
        mark: dict[str, Any] = {"color": color, "markeredgewidth": 0, "linestyle": "none"}
        axes.plot([psnr.min(), best], [lane, lane], color=color, linewidth=1.2, alpha=0.5, zorder=2)
        axes.plot(psnr, np.full(len(psnr), lane), marker="o", markersize=4, alpha=0.45, zorder=3, **mark)
        if mean < high:
            axes.plot([mean], [lane], marker="|", markersize=12, zorder=4, **{**mark, "markeredgewidth": 2})
        axes.plot([best], [lane], marker=">" if row.worst_psnr > high else "o", markersize=8, zorder=5, **mark)
        unit = "" if math.isinf(row.worst_psnr) else " dB"
        axes.annotate(
            f"{s.decibels(row.worst_psnr)}{unit} {s.case_words(report, row.case)}",
            xy=(best, lane),
            xytext=(9, 0),
            textcoords="offset points",
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1},
            **note_style(color, va="center"),
        )
    top = -0.75
    # The labels right of the marks need about a fifth of the width.
    axes.set_xlim(low, high + 0.24 * (high - low))
    step = 10 if high - low > 45 else 5
    axes.set_xticks(np.arange(math.ceil(low / step) * step, high + 1e-9, step))
    axes.set_ylim(len(names) - 0.2, top)
    bottom = len(names) - 0.28
    edges = (low, s.GONE_PSNR, s.RECOGNISABLE_PSNR)
    for edge, words in zip(edges, ("mostly gone", "partly visible", "recognisable in detail"), strict=True):
        axes.annotate(
            words,
            xy=(edge, top),
            xytext=(0, -3),
            textcoords="offset points",
            **note_style(theme.muted, ha="left", va="top"),
        )
    # Lines end below the words at the top, lest one crosses them.
    for edge in edges[1:]:
        axes.plot([edge, edge], [top + 0.3, bottom], color=theme.grid, linewidth=1.2, zorder=1)
    if report.prior_psnr is not None:
        axes.plot(
            [report.prior_psnr] * 2,
            [top + 0.3, bottom],
            color=theme.ink,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            zorder=1,
        )
        axes.annotate(
            f"average picture, {s.decibels(report.prior_psnr)} dB",
            xy=(report.prior_psnr, bottom),
            xytext=(5, 0),
            textcoords="offset points",
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1},
            **note_style(theme.ink, va="bottom"),
        )
    style_axes(axes, theme, "PSNR, dB (dots: examples; bar: their mean; large dot: the most exposed)", "")
    axes.set_yticks(range(len(names)))
    set_text(axes.set_yticklabels, [short(name, 22) for name in names], color=theme.ink, size=9.5)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)


# ---------------------------------------------------------------------- influence check


def _draw_influence(figure: SubFigure | Figure, report: LeakageReport, theme: Theme) -> None:
    # On an axis of decades 10% is a hair: the ratio, at the right, shows it.
    both, ratio, key = figure.subplots(1, 3, width_ratios=(3.6, 3.4, 2.2))
    rows = _positive_influence_rows(report)
    names = list(dict.fromkeys(row["perturbation"] for row in rows))
    values = [row[what] for row in rows for what in ("predicted", "observed")]
    misses = [row["observed"] / row["predicted"] for row in rows]
    predicted = [row["predicted"] for row in rows]
    ends = np.array([min(values) / 1.6, max(values) * 1.6])
    sides = np.array([min(predicted) / 1.6, max(predicted) * 1.6])
    band = {"color": theme.muted, "alpha": 0.18, "linewidth": 0, "zorder": 1}
    both.fill_between(ends, ends * (1 - s.BAND), ends * (1 + s.BAND), **band)
    both.plot(ends, ends, color=theme.muted, linewidth=1, zorder=2)
    ratio.fill_between(sides, 1 - s.BAND, 1 + s.BAND, **band)
    ratio.plot(sides, [1, 1], color=theme.muted, linewidth=1, zorder=2)
    marks = {
        name: {"marker": MARKS[i % len(MARKS)], "color": theme.series[i % len(theme.series)]}
        for i, name in enumerate(names)
    }
    for row, miss in zip(rows, misses, strict=True):
        look = {
            **marks[row["perturbation"]],
            "markersize": 6.5,
            "markeredgewidth": 1.3,
            "linestyle": "none",
            "zorder": 3,
        }
        if not row["in_range"]:
            look["markerfacecolor"] = "none"
        both.plot([row["predicted"]], [row["observed"]], **look)
        ratio.plot([row["predicted"]], [miss], **look)
    both.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ratio.set(xscale="log", xlim=sides)
    if max(misses) > 3:
        ratio.set(yscale="log", ylim=(min(0.7, *misses) / 1.2, max(misses) * 1.2))
    else:
        ratio.set(ylim=(max(0.0, min(0.7, *misses) - 0.1), max(1.3, *misses) + 0.1))
    for axes, label in ((both, "observed error, input units"), (ratio, "observed / predicted")):
        style_axes(axes, theme, "predicted error (I2F), input units", label)
        sparse_log_ticks(axes)
        axes.grid(color=theme.grid, linewidth=0.8)
    _draw_influence_key(key, marks, any(not row["in_range"] for row in rows), theme)


def _draw_influence_key(axes: Axes, marks: dict[str, dict], hollow: bool, theme: Theme) -> None:
    """What each mark means, beside the axes: labels at the marks would collide, they all lie along one line."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(max(10.0, len(marks) + 3.5), -0.5))
    for row, (name, look) in enumerate(marks.items()):
        axes.plot([0.05], [row], markersize=6.5, linestyle="none", **look)
        axes.text(0.13, row, short(name, 27), **note_style(theme.ink, va="center"))
    below = len(marks) + 0.3
    axes.fill(
        [0.01, 0.09, 0.09, 0.01],
        [below - 0.2, below - 0.2, below + 0.2, below + 0.2],
        color=theme.muted,
        alpha=0.3,
        linewidth=0,
    )
    axes.text(0.13, below, f"within {s.BAND:.0%}", **note_style(theme.muted, va="center"))
    if hollow:
        axes.plot([0.05], [below + 1], "o", color=theme.muted, markerfacecolor="none", markersize=6.5)
        axes.text(
            0.13,
            below + 0.72,
            "out of range: too far for\na first-order prediction",
            **note_style(theme.muted, va="top"),
        )


def _positive_influence_rows(report: LeakageReport) -> list[dict]:
    """The rows that a log axis can show."""
    return [
        row for row in s.influence_rows(report) if all(0 < row[key] < math.inf for key in ("predicted", "observed"))
    ]


# ---------------------------------------------------------------------- the sections, in their order


RECONSTRUCTIONS = Part(
    "What attacks get",
    draw_reconstructions,
    reconstructions_height,
    lambda report: report.originals is not None and bool(report.attacked) and bool(reconstruction_rows(report)),
    "No reconstructions: nothing was attacked, or no pictures were kept.",
    reconstructions_width,
)
ATTACKS = Part(
    "How close attacks come",
    _draw_attacks,
    lambda report: 1.35 + 0.75 * len({row.attack for row in s.attack_rows(report) if row.failure is None}),
    lambda report: any(row.failure is None for row in s.attack_rows(report)),
    "No attack came back with anything.",
)
SPECTRUM = Part(
    "How strongly the gradient shows each change of the input",
    _draw_spectrum,
    lambda report: 3.3,
    lambda report: any(any(0 < v < math.inf for v in values) for values in report.spectrum),
    "No spectrum was computed.",
)
INFLUENCE = Part(
    "Does the prediction hold? I2F beside the error an attack had",
    _draw_influence,
    lambda report: max(3.8, 1.3 + 0.3 * len({row["perturbation"] for row in s.influence_rows(report)})),
    lambda report: bool(_positive_influence_rows(report)),
    "The influence prediction was not checked.",
)
#: File stem -> section, in the order of the page.
PARTS: dict[str, Part] = {
    "reconstructions": RECONSTRUCTIONS,
    "attacks": ATTACKS,
    "spectrum": SPECTRUM,
    "influence": INFLUENCE,
}
