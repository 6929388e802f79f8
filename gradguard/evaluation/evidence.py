"""What a verdict rests on: the numbers of the worst example and the best attack, and whether they prove anything.

An attack that fails on a defended gradient says something only if it works with the defense off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gradguard.attacks import Attack
from gradguard.evaluation.scoring import named
from gradguard.policy import Policy
from gradguard.report import AttackScore, LabelScore, LeakageReport
from gradguard.report.leakage_report import Case
from gradguard.report.scores import best_labels, best_psnr, best_ssim, lowest

#: dB by which an attack must beat a guess to have worked: half the guess's squared error.
BEATS_BY = 3.0

Score = TypeVar("Score", AttackScore, LabelScore)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a set of attacks got from one gradient.

    Args:
        inputs: By the attack's name. An attack on the labels that could not run is here, too, as a score with its
            `failure`.
        labels: By the attack's name.
    """

    inputs: dict[str, AttackScore] = field(default_factory=dict)
    labels: dict[str, LabelScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers that a policy judges.

    Args:
        predicted_error: Per example, in input units (Euclidean norm over the example).
        converged: Per example, whether its predicted error can be relied on.
        size: Elements of an example.
        span: Of the value range, `high - low`.
        noise_ratio: `|sent - true| / |true|`.
        sent: Scores on what is sent.
        bare: Scores on the bare gradient.
        guess_psnr: Per attacked example, of a guess that looks at no gradient, dB.
        attacks: Those that were to run, by name.
    """

    predicted_error: Sequence[float]
    converged: Sequence[bool]
    size: int
    span: float
    noise_ratio: float
    sent: Scores
    bare: Scores
    guess_psnr: Sequence[float]
    attacks: Mapping[str, Attack] = field(default_factory=dict)

    @property
    def attacks_inputs(self) -> list[str]:
        """Names of the attacks on inputs."""
        return [name for name, attack in self.attacks.items() if attack.recovers_inputs]

    @property
    def attacks_labels(self) -> list[str]:
        """Names of the attacks on labels."""
        return [name for name, attack in self.attacks.items() if not attack.recovers_inputs]


def by_attack(cases: Mapping[Case, Mapping[str, Score]]) -> dict[str, dict[Case, Score]]:
    """Scores per gradient as scores per attack, as a report holds them."""
    names = dict.fromkeys(name for scores in cases.values() for name in scores)
    return {name: {case: scores[name] for case, scores in cases.items() if name in scores} for name in names}


def of_report(report: LeakageReport, case: Case) -> Scores:
    """The scores of one of a report's gradients."""
    labels = {name: cases[case] for name, cases in report.label_attacks.items() if case in cases}
    return Scores(inputs=report.scores(case), labels=labels)


def evidence_of(report: LeakageReport, case: Case, attacks: Sequence[Attack]) -> Evidence:
    """What an audit's report says of one of its gradients.

    Args:
        report: Of the audit.
        case: "without" (the bare gradient) or "with" (as the defense sends it).
        attacks: Those that the audit ran.

    Returns:
        The evidence.
    """
    threat = report.extra.get("threat") or {}
    low, high = threat.get("value_range") or (0.0, 1.0)
    return Evidence(
        predicted_error=report.predicted_error,
        converged=report.predicted_converged,
        size=math.prod(report.input_shape),
        span=high - low,
        noise_ratio=report.noise_ratio,
        sent=of_report(report, case),
        bare=of_report(report, "without"),
        guess_psnr=report.guess_psnr,
        attacks=named(attacks),
    )


def measures_of(evidence: Evidence) -> dict[str, float]:
    """The numbers of the worst example and of the best attack, by name.

    Args:
        evidence: Of one gradient.

    Returns:
        Those that are known among `predicted_error` (root mean squared error per element, a share of the value range),
            `attacked_psnr` and `bare_attacked_psnr` (dB), `attacked_ssim` (in [-1, 1]), `label_recovery` and
            `bare_label_recovery` (`IRec`, in [0, 1]).
    """
    error = lowest(evidence.predicted_error)
    best = best_labels(evidence.sent.labels)
    bare_labels = best_labels(evidence.bare.labels)
    found = {
        "predicted_error": None if error is None else error / (math.sqrt(evidence.size) * evidence.span),
        "attacked_psnr": best_psnr(evidence.sent.inputs.values()),
        "attacked_ssim": best_ssim(evidence.sent.inputs.values()),
        "label_recovery": None if best is None else best.i_rec,
        "bare_attacked_psnr": best_psnr(evidence.bare.inputs.values()),
        "bare_label_recovery": None if bare_labels is None else bare_labels.i_rec,
    }
    return {name: value for name, value in found.items() if value is not None}


# ---------------------------------------------------------------------- what a verdict in favour rests on


def unproven(policy: Policy, evidence: Evidence) -> list[str]:
    """Why meeting the policy would prove nothing; nothing if it is proven."""
    reasons = []
    attacks_count = bool(evidence.attacks_inputs) and policy.judges("attacked_psnr", "attacked_ssim")
    proven = attacks_count and any(_proves(name, evidence) for name in evidence.attacks_inputs)
    if attacks_count and not proven:
        said = "; ".join(_why_not(name, evidence) for name in evidence.attacks_inputs)
        reasons.append(f"no attack proves it, since none works with the defense off and runs on what is sent: {said}")
    missed = sum(not converged for converged in evidence.converged)
    if missed and not proven and (policy.judges("predicted_error") or not attacks_count):
        reasons.append(
            f"{missed} of {len(evidence.converged)} predicted errors did not converge or cannot be predicted, so the "
            "predictions prove nothing either"
        )
    if not attacks_count and not policy.judges("predicted_error"):
        reasons.append("neither the predicted error nor any attack on the inputs is judged: nothing was asked")
    if policy.judges("label_recovery") and not _labels_work(evidence):
        reasons.append(_why_not_labels(evidence))
    return reasons


def works(score: AttackScore | None, guess: Sequence[float]) -> bool:
    """Whether an attack beats the guess, by `BEATS_BY` dB on one example at least."""
    return score is not None and any(p >= g + BEATS_BY for p, g in zip(score.psnr, guess, strict=False))


def _proves(name: str, evidence: Evidence) -> bool:
    sent = evidence.sent.inputs.get(name)
    ran = sent is not None and bool(sent.psnr) and not any(math.isnan(p) for p in sent.psnr)
    return ran and works(evidence.bare.inputs.get(name), evidence.guess_psnr)


def _why_not(name: str, evidence: Evidence) -> str:
    """One attack, and why its failure proves nothing."""
    bare, sent = evidence.bare.inputs.get(name), evidence.sent.inputs.get(name)
    if bare is None:
        return f"{name} has not been tried on the bare gradient"
    if bare.failure is not None or not bare.psnr:
        return f"{name} cannot run on the bare gradient ({bare.failure or 'no reconstruction'})"
    if not works(bare, evidence.guess_psnr):
        gains = [p - g for p, g in zip(bare.psnr, evidence.guess_psnr, strict=False)]
        place = max(range(len(gains)), key=lambda i: -math.inf if math.isnan(gains[i]) else gains[i])
        return (
            f"{name} gets {bare.psnr[place]:.1f} dB from the bare gradient, where a guess gets "
            f"{evidence.guess_psnr[place]:.1f} dB"
        )
    failure = sent.failure if sent is not None and sent.failure else "no reconstruction"
    return f"{name} works on the bare gradient and cannot run on what is sent ({failure})"


def _labels_work(evidence: Evidence) -> bool:
    """Whether an attack on labels beats a guess on the bare gradient, and ran on what is sent."""
    return any(
        name in evidence.sent.labels
        and name in evidence.bare.labels
        and evidence.bare.labels[name].i_rec > _label_guess(evidence.bare.labels[name])
        for name in evidence.attacks_labels
    )


def _label_guess(score: LabelScore) -> float:
    """IRec of equal counts for all classes: `sum_c min(B / C, n_c) / B`."""
    total, classes = sum(score.true), len(score.true)
    return sum(min(total / classes, count) for count in score.true) / total if total else 0.0


def _why_not_labels(evidence: Evidence) -> str:
    if not evidence.attacks_labels:
        return "the policy judges labels and no attack on labels has run"
    said = []
    for name in evidence.attacks_labels:
        bare, failed = evidence.bare.labels.get(name), evidence.bare.inputs.get(name)
        if bare is None:
            said.append(f"{name} cannot run on the bare gradient ({failed.failure if failed else 'not tried'})")
        else:
            said.append(f"{name} recovers {bare.i_rec:.0%} of the bare gradient's, a guess {_label_guess(bare):.0%}")
    return f"no attack on labels works with the defense off and runs on what is sent: {'; '.join(said)}"
