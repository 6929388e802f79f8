"""The same gradient under several defenses, attacked in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from gradguard.attacks import Attack
from gradguard.defenses import Defense
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction
from gradguard.functional.vectors import add, flatten
from gradguard.functional.whole_batch import take
from gradguard.guard import Guard
from gradguard.report import LeakageReport
from gradguard.report.leakage_report import Case
from gradguard.threats.model import ThreatModel

#: Train with a defense (or none) and return a score, for instance the accuracy in [0, 1].
Training = Callable[[Defense | None], float]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """What one defense leaves of one batch.

    Args:
        defense: Its repr, "none" for the bare gradient.
        noise_ratio: `|delta| / |g|`.
        cosine: Between the sent and the true gradient, in [-1, 1].
        predicted_error: I2F of the worst example, input units.
        psnr: dB, per attack on its worst example.
        best_psnr: The best of them: the number that counts.
        label_recovery: IRec, in [0, 1].
        score: What training with it reached, where a training was given.
    """

    defense: str
    noise_ratio: float
    cosine: float
    predicted_error: float
    psnr: dict[str, float]
    best_psnr: float | None
    label_recovery: float | None
    score: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the defenses, the bare gradient first."""

    rows: tuple[ComparisonRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"rows": [asdict(row) for row in self.rows]}

    def print(self) -> None:
        """A table on the terminal."""
        table = Table(
            Column("defense", overflow="fold", min_width=24),
            "noise",
            "cosine",
            "predicted error",
            "best attack, dB",
            "labels",
            "score",
        )
        for row in self.rows:
            values = (row.best_psnr, row.label_recovery, row.score)
            psnr, labels, score = ("-" if v is None else f"{v:.3g}" for v in values)
            numbers = (f"{row.noise_ratio:.3g}", f"{row.cosine:.3f}", f"{row.predicted_error:.3g}")
            table.add_row(row.defense, *numbers, psnr, labels, score)
        Console().print(table)


def compare(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any,
    defenses: Sequence[Defense],
    *,
    attacks: Sequence[Attack] | None = None,
    threat: ThreatModel | None = None,
    training: Training | None = None,
    seed: int = 0,
    workers: int = 1,
    input_module: str | None = None,
    private: str | int | None = None,
) -> Comparison:
    """Audit one batch's gradient bare and under each of several defenses, with the same attacks and the same starts.

    Args:
        model: As in `Guard.audit`.
        loss_fn: As in `Guard.audit`.
        inputs: Shape `(B, *input_shape)`, or a structure, as in `Guard.audit`; tokens where there is an `input_module`.
        targets: Shape `(B, ...)`, or a structure.
        defenses: What is compared.
        attacks: As in `Guard`.
        threat: As in `Guard`.
        training: Also train with each defense and score it: privacy is worth nothing without usefulness beside it.
        seed: Of the noise and of the attacks' starts.
        workers: Defenses at a time (joblib processes).
        input_module: As in `Guard`.
        private: As in `Guard`.

    Returns:
        A row per defense, the bare gradient first.

    Raises:
        InputError: What `Guard.audit` raises, before any training or attack.
    """
    options: dict[str, Any] = {"attacks": attacks, "threat": threat, "input_module": input_module, "private": private}
    function, own, rest = take(Guard(**options).loss_gradient(model, loss_fn), inputs, targets)
    function.check_batch(own, rest)
    (threat or ThreatModel()).check_inputs(own)

    def row(defense: Defense | None) -> ComparisonRow:
        guard = Guard(defense=defense, **options)
        # Drawn once here and given to the audit, so that the cosine is that of the gradient that is attacked.
        generator = torch.Generator().manual_seed(seed)
        true = function(own, rest)
        jacobian = InputJacobian(function, own, rest, validate=False)
        sent = add(true, defense.checked_perturbation(true, jacobian, generator=generator)) if defense else None
        generator.manual_seed(seed)
        report = guard.audit(model, loss_fn, inputs, targets, sent=sent, generator=generator)
        cosine = torch.nn.functional.cosine_similarity(flatten(sent or true), flatten(true), dim=0).item()
        return _row(report, defense, cosine, training(defense) if training else None)

    found = Parallel(n_jobs=workers)(delayed(row)(defense) for defense in (None, *defenses))
    return Comparison(tuple(found))


def _row(report: LeakageReport, defense: Defense | None, cosine: float, score: float | None) -> ComparisonRow:
    case: Case = "with" if defense else "without"
    labels = report.label_recovery.get(case)
    return ComparisonRow(
        defense=repr(defense) if defense else "none",
        noise_ratio=report.noise_ratio,
        cosine=cosine,
        predicted_error=torch.tensor(report.predicted_error, dtype=torch.float64).min().item(),
        psnr={n: psnr for n, score in report.scores(case).items() if (psnr := score.best_psnr) is not None},
        best_psnr=report.best_psnr(case),
        label_recovery=labels.i_rec if labels else None,
        score=score,
    )
