"""The report as one HTML page that needs nothing else: for reading in a browser, mailing, printing.

It holds private pictures: the page and the pictures beside it are readable by their owner only.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.image
from torch import Tensor

from gradguard.errors import InputError
from gradguard.report import summaries as s
from gradguard.report.leakage_report import Case, LeakageReport
from gradguard.report.pictures import as_picture, is_picture
from gradguard.report.plots import PARTS, Part, draw_part
from gradguard.report.theme import DARK, LIGHT, Theme
from gradguard.storage.files import atomic_path, write_text

#: Pixels per inch: embedded figures are shown at 100, so that they stay sharp on dense screens.
EMBEDDED_DPI, PLAIN_DPI = 180, 150
#: Pictures narrower than this are enlarged without smoothing: their pixels are what there is.
SMALL_PICTURE = 96

ADVICE = {
    "send": "Send the gradient as it is.",
    "perturb": "Send the perturbed gradient, not the true one.",
    "block": "Send neither the true gradient nor the perturbed one.",
    "unproven": "Do not send this gradient: nothing proves that it is safe.",
}


@dataclass(frozen=True, kw_only=True)
class EmbeddedFigure:
    """A figure for a page that stands alone.

    Args:
        light: Data URI for light pages.
        dark: Data URI for dark pages.
        width: Pixels it is laid out at.
        height: Pixels it is laid out at.
        alt: The figure in words.
    """

    light: str
    dark: str
    width: int
    height: int
    alt: str


def save_html(report: LeakageReport, path: str | Path) -> Path:
    """Write a report as one self-contained page, and its figures as plain PNGs beside it.

    The PNGs are `reconstructions.png`, `attacks.png`, `spectrum.png` and `influence.png`, those that the report has
    something for; they replace files of these names. Everything is written atomically, with mode 0600.

    Args:
        report: What to write.
        path: The page's file.

    Returns:
        The path.

    Raises:
        InputError: If `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"`path` must name a file, and {str(path)!r} is a folder; try {str(path / 'report.html')!r}.")
    page = render_html(report)
    for stem, part in PARTS.items():
        if part.applies(report):
            with atomic_path(path.parent / f"{stem}.png") as temporary:
                temporary.write_bytes(figure_png(report, part, LIGHT, dpi=PLAIN_DPI, titled=True))
    write_text(path, page)
    return path


def render_html(report: LeakageReport) -> str:
    """The page itself. Every name in it is escaped; it loads nothing and runs nothing."""
    return template("report.html.j2").render(report=report, light=LIGHT, dark=DARK, **_context(report))


def template(name: str) -> jinja2.Template:
    """A page's template: it escapes every name, refuses undefined ones, and has the summaries as `s`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradguard.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(s=s)
    return environment.get_template(name)


def _context(report: LeakageReport) -> dict[str, Any]:
    """What the page shows and the template does not read off the report or `summaries` itself."""
    last = s.cases(report)[-1]
    return {
        "advice": _advice(report),
        "attacks": [(attack, list(rows)) for attack, rows in groupby(_ran(report), key=lambda row: row.attack)],
        "figures": {stem: _embedded(report, part, stem) for stem, part in PARTS.items() if part.applies(report)},
        "triple": _worst_pictures(report),
        "best": {case: report.best_psnr(case) for case in ("without", "with")},
        "last": last,
        "perturbed": len(s.cases(report)) == 2,
        "threat": s.threat(report),
        "picture": is_picture(report.input_shape),
        "lowest_error": s.quantile(report.predicted_error, 0.0) / math.prod(report.input_shape) ** 0.5,
        "size": math.prod(report.input_shape),
        "has_ssim": any(not math.isnan(row.mean_ssim) for row in _ran(report)),
        "folded": len(report.predicted_error) > s.FOLD_ABOVE,
    }


def _ran(report: LeakageReport) -> list[s.AttackRow]:
    return [row for row in s.attack_rows(report) if row.failure is None]


def _advice(report: LeakageReport) -> str:
    """The decision as an instruction."""
    if report.verdict is None:
        return ""
    decision = report.verdict.decision
    return "Do not send this gradient." if decision == "block" and len(s.cases(report)) == 1 else ADVICE[decision]


def figure_png(report: LeakageReport, part: Part, theme: Theme, *, dpi: int, titled: bool) -> bytes:
    """One section of `plots.PARTS` as a PNG file's content."""
    buffer = io.BytesIO()
    draw_part(report, part, theme, titled=titled).savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def picture_png(example: Tensor, value_range: tuple[float, float]) -> bytes:
    """One example as a PNG file's content, a pixel per pixel."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, as_picture(example, value_range), cmap="gray", vmin=0, vmax=1, format="png")
    return buffer.getvalue()


def _embedded(report: LeakageReport, part: Part, stem: str) -> EmbeddedFigure:
    light, dark = (figure_png(report, part, theme, dpi=EMBEDDED_DPI, titled=False) for theme in (LIGHT, DARK))
    width, height = (int.from_bytes(light[at : at + 4], "big") * 100 // EMBEDDED_DPI for at in (16, 20))
    return EmbeddedFigure(
        light=_data_uri(light), dark=_data_uri(dark), width=width, height=height, alt=_alt(report, stem)
    )


def _alt(report: LeakageReport, stem: str) -> str:
    """A figure in words, for who cannot see it; its numbers are in the tables."""
    attacks = ", ".join(dict.fromkeys(row.attack for row in _ran(report)))
    return {
        "reconstructions": f"Pictures of the batch, and below them what {attacks} made of each, with its PSNR.",
        "attacks": f"PSNR of every attacked example for {attacks}; the table below has the numbers.",
        "spectrum": f"Falling curves: the eigenvalues of J Jᵀ for {s.count(len(report.spectrum), 'example')}.",
        "influence": "Predicted against observed errors. "
        + (s.influence_words(report) if s.influence_rows(report) else ""),
    }[stem]


def _worst_pictures(report: LeakageReport) -> list[dict[str, Any]]:
    """The most exposed example and the best that attacks made of it: `caption`, `case`, `uri`, `small` of each."""
    worst = s.most_exposed(report)
    if report.originals is None or worst not in report.attacked or not is_picture(report.input_shape):
        return []
    place = report.attacked.index(worst)
    found: list[tuple[str, Case | None, Tensor]] = [("original", None, report.originals[place])]
    for case in s.cases(report):
        scores = [(name, by_case[case]) for name, by_case in report.attacks.items() if case in by_case]
        seen = [
            (x.psnr[place], name, x.pictures[place])
            for name, x in scores
            if x.pictures is not None and place < len(x.psnr)
        ]
        if seen:
            psnr, name, picture = max(seen, key=lambda entry: -math.inf if math.isnan(entry[0]) else entry[0])
            unit = "\u00a0dB" if psnr < float("inf") else ""
            found.append((f"{name} {s.case_words(report, case)}: {s.decibels(psnr)}{unit}", case, picture))
    if len(found) == 1:
        return []
    small = min(report.input_shape[-2:]) < SMALL_PICTURE
    return [
        {
            "caption": caption,
            "case": case,
            "uri": _data_uri(picture_png(picture, s.value_range(report))),
            "small": small,
        }
        for caption, case, picture in found
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
