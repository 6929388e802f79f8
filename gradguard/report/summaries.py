"""What tables, plots and the HTML page say alike: rows of numbers, names of examples, numbers as words.

Nothing here measures: every row is read off a `LeakageReport`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradguard.report.leakage_report import Case, LabelScore, LeakageReport

#: PSNR (dB) above which a picture is recognisable in detail, and below which it is mostly gone: rules of thumb.
RECOGNISABLE_PSNR, GONE_PSNR = 30.0, 15.0
#: Batches above this many examples are folded: errors to quantiles, classes to the most exposed.
FOLD_ABOVE = 16
#: How close a prediction is to be to what is observed, relative.
BAND = 0.1
#: Rows of a folded table of classes.
CLASS_ROWS = 10


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """One attack on one gradient. "Worst" is the worst for privacy: the highest PSNR (dB) and the highest SSIM.

    `worst_example`: its index into the batch, by PSNR. `failure`: why there are no numbers.
    """

    attack: str
    case: Case
    mean_psnr: float = math.nan
    worst_psnr: float = math.nan
    worst_example: int | None = None
    mean_ssim: float = math.nan
    worst_ssim: float = math.nan
    converged: float = math.nan
    matching_loss: float = math.nan
    seconds: float = math.nan
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """Predicted errors of one example, one class, or one quantile of the batch.

    `error`, `lower_bound`: Euclidean norm over the example, input units; `rms`: `error / sqrt(D)`, input units per
    element; `lambda_max`: of `J J^T`; `converged`: whether the solver did; `worst`: whether to point at it.
    """

    name: str
    error: float
    rms: float
    lower_bound: float
    lambda_max: float
    converged: bool = True
    worst: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class of a large batch: how many examples, and their lowest and median predicted error (input units)."""

    name: str
    examples: int
    lowest: float
    median: float


# ---------------------------------------------------------------------- numbers as words


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits; a dash for what is not known, `inf` for what is not finite."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10**digits - 0.5:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def decibels(value: float | None) -> str:
    """A PSNR with one decimal, without its unit; "exact" for a perfect reconstruction, a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return "exact" if value == math.inf else f"{value:.1f}"


def fraction(value: float | None) -> str:
    """A number in [0, 1] with three decimals, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def hundredths(value: float | None) -> str:
    """A number with two decimals, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.3g}%" if abs(value) < 10 else number(100 * value) + "%"


def count(n: int, word: str) -> str:
    """`1 example`, `4 examples`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def duration(value: float | None) -> str:
    """Seconds as a length of time that fits its size."""
    if value is None or math.isnan(value):
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 60:.3g} min"


def sentence(text: str) -> str:
    """`text` as a sentence: a capital first, a full stop last."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def psnr_words(value: float | None, prior: float | None = None) -> str:
    """What a PSNR (dB) lets one see, in plain words; `prior`: the PSNR of guessing the mean picture."""
    if value is None or math.isnan(value):
        return "nothing was reconstructed"
    if prior is not None and value <= prior:
        return "no better than guessing the average picture"
    if value >= RECOGNISABLE_PSNR:
        return "recognisable in detail"
    return "mostly gone" if value < GONE_PSNR else "partly visible"


# ---------------------------------------------------------------------- which gradients, and what the attacker knows


def cases(report: LeakageReport) -> tuple[Case, ...]:
    """The gradients that the report speaks of: the true one, and the one that is sent where it is another."""
    perturbed = report.defense is not None or report.noise_ratio > 0 or "with" in report.label_recovery
    if perturbed or any("with" in scores for scores in report.attacks.values()):
        return ("without", "with")
    return ("without",)


def case_words(report: LeakageReport, case: Case) -> str:
    """What to call a gradient. One may be sent perturbed though no defense is named: compressed, say."""
    if report.defense is None and len(cases(report)) == 2:
        return "true gradient" if case == "without" else "as sent"
    return "without defense" if case == "without" else "with defense"


def defense_name(report: LeakageReport) -> str:
    """The defense without its settings, for running text."""
    return "the sender" if report.defense is None else report.defense.split("(", 1)[0]


def threat(report: LeakageReport) -> dict[str, Any]:
    """The threat model, from `extra["threat"]` (the fields of `policy.ThreatModel`), or nothing."""
    return dict(report.extra.get("threat") or {})


def value_range(report: LeakageReport) -> tuple[float, float]:
    """The range of valid inputs, which pictures are shown in: the threat model's, [0, 1] if it says nothing."""
    low, high = threat(report).get("value_range") or (0.0, 1.0)
    return float(low), float(high)


# ---------------------------------------------------------------------- who is meant


def example_name(report: LeakageReport, index: int) -> str:
    """`example 3 (class cat)`; without its class where the report has no label for it."""
    if not 0 <= index < len(report.labels):
        return f"example {index}"
    return f"example {index} (class {report.class_name(report.labels[index])})"


def shape_words(report: LeakageReport) -> str:
    """The shape of one example: `3×32×32`."""
    return "×".join(map(str, report.input_shape)) + (" elements" if len(report.input_shape) == 1 else "")


def most_exposed(report: LeakageReport) -> int | None:
    """`report.worst_example()`, or `None` where nothing tells the examples apart: no attack, equal predicted errors."""
    worst = report.worst_example()
    attacked = any(row.failure is None for row in attack_rows(report))
    return worst if attacked or len(set(report.predicted_error)) > 1 else None


def exposure(report: LeakageReport) -> str | None:
    """One sentence naming the most exposed example, its class, and the number that says so; `None` without one."""
    worst = most_exposed(report)
    if worst is None:
        return None
    name, case = example_name(report, worst), cases(report)[-1]
    found = [row for row in attack_rows(report) if row.case == case and row.worst_example == worst]
    if not found:
        return f"{name}: predicted error {number(report.predicted_error[worst])}, the lowest of the batch."
    row = max(found, key=lambda row: row.worst_psnr)
    reaches = "recovers it exactly" if row.worst_psnr == math.inf else f"reaches {decibels(row.worst_psnr)} dB"
    return (
        f"{name}: {row.attack} {reaches} {case_words(report, case)}, {psnr_words(row.worst_psnr, report.prior_psnr)}."
    )


# ---------------------------------------------------------------------- rows


def attack_rows(report: LeakageReport) -> list[AttackRow]:
    """Every attack on every gradient it was run on, in the report's order, the bare gradient first."""
    rows = []
    for attack, scores in report.attacks.items():
        for case in cases(report):
            if case not in scores:
                continue
            score = scores[case]
            if score.failure is not None or not score.psnr:
                rows.append(AttackRow(attack=attack, case=case, failure=score.failure or "no reconstruction"))
                continue
            place = max(range(len(score.psnr)), key=lambda i: _or(score.psnr[i], -math.inf))
            rows.append(
                AttackRow(
                    attack=attack,
                    case=case,
                    mean_psnr=_mean(score.psnr),
                    worst_psnr=score.psnr[place],
                    worst_example=report.attacked[place] if place < len(report.attacked) else None,
                    mean_ssim=_mean(score.ssim),
                    worst_ssim=max(_known(score.ssim), default=math.nan),
                    converged=score.converged,
                    matching_loss=score.matching_loss,
                    seconds=score.seconds,
                )
            )
    return rows


def failures(report: LeakageReport) -> list[str]:
    """A sentence per attack that could not run, one for both gradients where the reason is the same."""
    reasons: dict[tuple[str, str], list[Case]] = {}
    for row in attack_rows(report):
        if row.failure is not None:
            reasons.setdefault((row.attack, row.failure), []).append(row.case)
    every = len(cases(report))
    return [
        f"{attack} did not run{'' if len(hit) == every else ' ' + case_words(report, hit[0])}: {reason}"
        for (attack, reason), hit in reasons.items()
    ]


def error_rows(report: LeakageReport) -> list[ErrorRow]:
    """Predicted errors: a row per example, or, above `FOLD_ABOVE` examples, quantiles from the most exposed on.

    Each column of a folded table is folded for itself: the rows are quantiles, not examples.

    Args:
        report: What to summarise.

    Returns:
        The rows in the order of the table.
    """
    size = len(report.predicted_error)
    scale = math.sqrt(math.prod(report.input_shape))
    columns = (report.predicted_error, report.lower_bound, report.lambda_max)
    if size > FOLD_ABOVE:
        places = (("lowest", 0.0), ("10% quantile", 0.1), ("median", 0.5), ("90% quantile", 0.9), ("highest", 1.0))
        return [
            ErrorRow(name=name, error=e, rms=e / scale, lower_bound=b, lambda_max=m)
            for name, (e, b, m) in ((name, [quantile(column, q) for column in columns]) for name, q in places)
        ]
    worst = most_exposed(report)
    rows = []
    for index, error in enumerate(report.predicted_error):
        bound, largest, converged = (
            column[index] if index < len(column) else missing
            for column, missing in (
                (report.lower_bound, math.nan),
                (report.lambda_max, math.nan),
                (report.predicted_converged, True),
            )
        )
        rows.append(
            ErrorRow(
                name=example_name(report, index),
                error=error,
                rms=error / scale,
                lower_bound=bound,
                lambda_max=largest,
                converged=bool(converged),
                worst=index == worst,
            )
        )
    return rows


def class_rows(report: LeakageReport) -> list[ClassRow]:
    """The `CLASS_ROWS` most exposed classes of a folded batch, lowest predicted error first; none for a small batch."""
    if len(report.predicted_error) <= FOLD_ABOVE:
        return []
    errors: dict[int, list[float]] = {}
    for label, error in zip(report.labels, report.predicted_error, strict=False):
        errors.setdefault(label, []).append(error)
    rows = [
        ClassRow(name=report.class_name(label), examples=len(e), lowest=quantile(e, 0.0), median=quantile(e, 0.5))
        for label, e in errors.items()
    ]
    return sorted(rows, key=lambda row: _or(row.lowest, math.inf))[:CLASS_ROWS]


def unconverged(report: LeakageReport) -> int:
    """How many predicted errors the solver did not finish."""
    return sum(not converged for converged in report.predicted_converged)


def label_rows(report: LeakageReport) -> list[tuple[Case, LabelScore]]:
    """Label recovery per gradient, the bare one first."""
    return [(case, report.label_recovery[case]) for case in cases(report) if case in report.label_recovery]


def empty_guess(score: LabelScore) -> float | None:
    """LeAcc and LnAcc of answering "no example of any class": the share of classes that the batch has none of."""
    return sum(count == 0 for count in score.true) / len(score.true) if score.true else None


def accuracy(report: LeakageReport) -> tuple[float, float | None] | None:
    """Test accuracy without and with the defense, from `extra["accuracy"]`; `None` where it was not measured."""
    values = report.extra.get("accuracy")
    return (values["without"], values.get("with")) if values else None


def influence_rows(report: LeakageReport) -> list[dict[str, Any]]:
    """The rows of `extra["influence_check"]`: predicted errors beside what an attack then measured."""
    return list(report.extra.get("influence_check") or [])


def prediction_miss(row: dict[str, Any]) -> float:
    """How far the observed error lies from the predicted one, relative to the predicted one, signed."""
    return row["observed"] / row["predicted"] - 1 if row["predicted"] else math.nan


def influence_words(report: LeakageReport) -> str:
    """How many predictions within their range of validity came within `BAND` of what was observed."""
    rows = [row for row in influence_rows(report) if row["in_range"]]
    close = sum(abs(prediction_miss(row)) <= BAND for row in rows)
    return f"{close} of {count(len(rows), 'prediction')} in range came within {BAND:.0%} of what was observed."


def accuracy_words(report: LeakageReport) -> str | None:
    """Test accuracy in one phrase, with its change in percentage points."""
    values = accuracy(report)
    if values is None:
        return None
    without, with_ = values
    if with_ is None:
        return f"{percent(without)} without a defense"
    return f"{percent(without)} without, {percent(with_)} with the defense ({100 * (with_ - without):+.1f} points)"


# ---------------------------------------------------------------------- statistics that survive missing numbers


def quantile(values: Sequence[float], q: float) -> float:
    """The `q` quantile of the known `values`, linearly interpolated; `nan` of none."""
    known = sorted(_known(values))
    if not known:
        return math.nan
    place = q * (len(known) - 1)
    low, high = known[math.floor(place)], known[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    known = _known(values)
    return sum(known) / len(known) if known else math.nan


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
