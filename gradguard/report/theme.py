"""How figures look: colours for light and dark pages, and text, axes and ticks in them.

Colours are Okabe and Ito's, told apart by colour-blind readers; marks differ in place or shape besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from gradguard.report.leakage_report import Case

#: Width of every figure, in inches: the HTML page shows an inch as 100 pixels.
WIDTH = 9.6
FONT = "DejaVu Sans"  # bundled with matplotlib: the same figure on every machine
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of a figure.

    Args:
        background: Of the figure.
        ink: For text.
        muted: For secondary text.
        grid: For what stays in the background.
        without: For the gradient without a defense.
        with_: For the gradient with one.
        worst: For the most exposed example.
        series: For anything else.
    """

    background: str
    ink: str
    muted: str
    grid: str
    without: str
    with_: str
    worst: str
    series: tuple[str, ...]

    def case(self, case: Case) -> str:
        """The colour of a gradient."""
        return self.without if case == "without" else self.with_


LIGHT = Theme(
    background="#ffffff",
    ink="#1c2430",
    muted="#5d6877",
    grid="#e3e7ec",
    without="#c9510c",
    with_="#0072b2",
    worst="#b0307f",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5d6877"),
)
DARK = Theme(
    background="#171c24",
    ink="#e8ecf1",
    muted="#9aa6b5",
    grid="#2c3440",
    without="#f28e4b",
    with_="#56b4e9",
    worst="#e58cc0",
    series=("#56b4e9", "#f28e4b", "#33c79a", "#e58cc0", "#e6b83c", "#9ad0f5", "#9aa6b5"),
)


def title_style(theme: Theme) -> dict:
    """What a section's title looks like, for `suptitle`."""
    return {"x": 0.01, "ha": "left", "color": theme.ink, "fontsize": 12, "fontweight": "bold", "fontfamily": FONT}


def note_style(color: str, **alignment: str) -> dict:
    """What a label inside the axes looks like; `alignment`: `ha`, `va`."""
    return {"color": color, "fontsize": 8.5, "fontfamily": FONT, "parse_math": False, **alignment}


def set_text(setter: Callable, text: str | list[str], *, color: str, size: float, **more: float) -> None:
    """Titles and labels from outside: a `$` in a class name is a dollar, not mathematics."""
    setter(text, color=color, fontsize=size, fontfamily=FONT, parse_math=False, **more)


def short(text: str, length: int) -> str:
    """`text`, printable, in at most `length` characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def style_axes(axes: Axes, theme: Theme, xlabel: str, ylabel: str) -> None:
    """Axes that stay in the background: two thin spines, small muted labels (with units), no minor ticks."""
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel, color=theme.muted, fontsize=9, fontfamily=FONT, labelpad=6)
    axes.set_ylabel(ylabel, color=theme.muted, fontsize=9, fontfamily=FONT, labelpad=6)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8.5, labelfontfamily=FONT, width=0.8)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set(color=theme.grid, linewidth=1.0, visible=side in ("left", "bottom"))


def sparse_log_ticks(axes: Axes) -> None:
    """Powers of ten, and 2 and 5 times them where an axis spans too few."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if axis.get_scale() != "log" or low <= 0:
            continue
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=9))
        if decades <= 2.5:
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
