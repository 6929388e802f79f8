"""Originals and reconstructions side by side: as pictures where inputs are pictures, as lines where they are not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from gradguard.report import summaries as s
from gradguard.report.leakage_report import Case, LeakageReport
from gradguard.report.theme import FONT, WIDTH, Theme, set_text, short

#: Inches that the names of the rows take, and a column of pictures at most.
NAMES, COLUMN = 1.7, 1.32
#: Most examples that `plot_reconstructions` shows: the most exposed ones.
COLUMNS = 8


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether inputs of this shape are shown as pictures: `(H, W)`, `(1, H, W)` or `(3, H, W)`."""
    return (len(shape) == 2 and min(shape) > 1) or (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1)


def as_picture(example: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """One example as `(H, W)` or `(H, W, 3)`, `value_range` mapped to [0, 1]; what is not a number becomes mid-grey."""
    low, high = value_range
    values = torch.nan_to_num((example.detach().float().cpu() - low) / (high - low), nan=0.5).clamp(0, 1)
    if values.ndim == 3:
        values = values[0] if values.shape[0] == 1 else values.permute(1, 2, 0)
    return values.numpy()


def reconstruction_rows(report: LeakageReport) -> list[tuple[str, Case]]:
    """The (attack, gradient) pairs that came back with pictures."""
    return [
        (row.attack, row.case)
        for row in s.attack_rows(report)
        if report.attacks[row.attack][row.case].pictures is not None
    ]


def shown_columns(report: LeakageReport) -> list[int]:
    """Which of the attacked examples are shown.

    Args:
        report: What is drawn.

    Returns:
        Places in the attacks' lists, at most `COLUMNS`: the most exposed ones where some are left out.
    """
    places = list(range(len(report.attacked)))
    if len(places) <= COLUMNS:
        return places
    case = s.cases(report)[-1]

    def best(place: int) -> float:
        scores = [scores[case].psnr for scores in report.attacks.values() if case in scores]
        return max((p[place] for p in scores if place < len(p) and not math.isnan(p[place])), default=-math.inf)

    return sorted(places, key=best, reverse=True)[:COLUMNS]


def draw_reconstructions(figure: SubFigure | Figure, report: LeakageReport, theme: Theme) -> None:
    """A column per example; the originals first, then a row per attack and gradient, PSNR (dB) under each."""
    originals = report.originals
    assert originals is not None  # `Part.applies`
    columns, rows = shown_columns(report), reconstruction_rows(report)
    picture, worst = is_picture(report.input_shape), s.most_exposed(report)
    if len(columns) < len(report.attacked):
        note = f"the {len(columns)} most exposed of {len(report.attacked)} attacked"
        figure.supxlabel(note, color=theme.muted, fontsize=8.5, fontfamily=FONT, x=0.01, ha="left")
    # In a figure wider than its own, few columns leave some of the grid empty, lest they are spread over it.
    fitting = int((figure.get_figure(root=True).get_figwidth() - NAMES) / (0.95 * COLUMN)) if picture else 3
    grid = figure.add_gridspec(len(rows) + 1, max(len(columns), fitting))
    for row in range(len(rows) + 1):
        attack, case = rows[row - 1] if row else ("", "without")
        score = report.attacks[attack][case] if row else None
        for column, place in enumerate(columns):
            axes = figure.add_subplot(grid[row, column])
            index = report.attacked[place]
            color = theme.worst if index == worst else theme.muted
            original = originals[place]
            example = original if score is None or score.pictures is None else score.pictures[place]
            if picture:
                axes.imshow(
                    as_picture(example, s.value_range(report)), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
                )
            else:
                line = theme.ink if score is None else theme.case(case)
                _draw_lines(axes, example, original, line, theme)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color=theme.worst if index == worst else theme.grid, linewidth=1.4 if index == worst else 0.8)
            if score is None:
                label = report.class_name(report.labels[index]) if index < len(report.labels) else "?"
                set_text(axes.set_title, f"#{index}, class {short(label, 12)}", color=color, size=8.5, pad=5)
            elif place < len(score.psnr):
                psnr = score.psnr[place]
                unit = "" if math.isinf(psnr) or math.isnan(psnr) else " dB"
                set_text(axes.set_xlabel, s.decibels(psnr) + unit, color=color, size=8.5, labelpad=3)
            if column == 0:
                _row_label(
                    axes,
                    attack,
                    s.case_words(report, case) if row else "original",
                    theme.case(case) if row else theme.muted,
                    theme,
                )


def reconstructions_width(report: LeakageReport) -> float:
    """Inches that the columns take: few pictures are not blown up to the width of other figures."""
    if not is_picture(report.input_shape):
        return WIDTH
    return min(NAMES + COLUMN * max(len(shown_columns(report)), 3), WIDTH)


def reconstructions_height(report: LeakageReport) -> float:
    """Inches of rows as high as the pictures in them, and their PSNR."""
    height = 0.85
    if is_picture(report.input_shape):
        aspect = report.input_shape[-2] / report.input_shape[-1]
        column = min((WIDTH - NAMES) / max(len(shown_columns(report)), 1), COLUMN)
        height = min(max(aspect * (column - 0.15), 0.5), 2.5)
    return 0.35 + (height + 0.27) * (len(reconstruction_rows(report)) + 1)


def _row_label(axes: Axes, attack: str, words: str, color: str, theme: Theme) -> None:
    """The attack's name over which gradient it saw, left of a row."""
    style: dict[str, Any] = {"xy": (0, 0.5), "xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
    style |= {"fontfamily": FONT, "parse_math": False, "annotation_clip": False}
    if attack:
        name = short(attack, 22)
        axes.annotate(name, xytext=(-10, 2), va="bottom", color=theme.ink, fontsize=9, fontweight="bold", **style)
    place = "top" if attack else "center"
    axes.annotate(words, xytext=(-10, -1), va=place, color=color, fontsize=8.5, **style)


def _draw_lines(axes: Axes, example: Tensor, original: Tensor, color: str, theme: Theme) -> None:
    """One example's elements as a line over those of the original, on the original's axis: rows can be compared."""
    truth = original.detach().flatten().float().cpu().numpy()
    if example is not original:
        axes.plot(truth, color=theme.muted, linewidth=1.0, alpha=0.6)
    axes.plot(example.detach().flatten().float().cpu().numpy(), color=color, linewidth=1.2)
    axes.set_facecolor("none")
    axes.margins(x=0.02)
    span = max(float(np.ptp(truth)), 1e-6)
    axes.set_ylim(truth.min() - 0.4 * span, truth.max() + 0.4 * span)
