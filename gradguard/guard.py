"""The pipeline: measure a gradient, perturb it, attack it, judge it."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.attacks import DLG, ILRG, RGAP, Attack
from gradguard.defenses import Defense
from gradguard.defenses.coverage import Uncovered, cover
from gradguard.errors import InputError
from gradguard.evaluation.messages import FOREIGN, Message, bare_tensors, covered_sentences, read_message
from gradguard.evaluation.scoring import prior_psnr, score_attack
from gradguard.functional.as_gradient import Missing, as_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode
from gradguard.functional.vectors import Gradient, add, norm
from gradguard.leakage import influence, influence_lower_bound, spectrum
from gradguard.policy import Policy
from gradguard.report import LabelScore, LeakageReport, Verdict
from gradguard.report.leakage_report import Case, Decision
from gradguard.threats.model import ThreatModel

#: What an audit attacks with unless told otherwise: one closed form, one optimisation, one for the labels.
DEFAULT_ATTACKS: tuple[Attack, ...] = (RGAP(), DLG(), ILRG())


@dataclass(frozen=True)
class Measures:
    """The closed-form part of a measurement, per example (shape `(B,)`).

    `predicted_error`: I2F of the difference between the gradient that is sent and the true one, in input units;
    `converged`: of its solver; `lower_bound`; `lambda_max`: of `J J^T`; `noise_ratio`: `|sent - true| / |true|`;
    `vectors`: `(B, D)`, the leading eigenvectors, to start the next measurement from.
    """

    predicted_error: Tensor
    converged: Tensor
    lower_bound: Tensor
    lambda_max: Tensor
    noise_ratio: float
    vectors: Tensor


class Guard:
    """Measure, perturb, attack, judge.

    `defense`: what to add to a gradient (`None`: nothing). `attacks`: what to prove it with (default: R-GAP, DLG and
    iLRG; `()` for none). `policy`: what is asked of a gradient. `threat`: what the attacker knows.
    `train_mode`: see `LossGradient`: what to do with modules that mix examples or are random in training mode.
    `max_iterations`: of the influence solver on inputs too large for a dense Jacobian; where it runs out, the
    prediction is still a lower one, and the report says that it did not converge.
    `uncovered`: what becomes of tensors of a message that the defense leaves as they are: "noise" covers them with
    isotropic noise at the same ratio, "refuse" raises (see `gradguard.defenses.coverage`).
    """

    def __init__(
        self,
        *,
        defense: Defense | None = None,
        attacks: Sequence[Attack] | None = None,
        policy: Policy | None = None,
        threat: ThreatModel | None = None,
        train_mode: TrainMode = "error",
        max_iterations: int = 300,
        uncovered: Uncovered = "noise",
    ) -> None:
        if defense is not None and not isinstance(defense, Defense):
            raise InputError(f"`defense` must be a gradguard.defenses.Defense, got {type(defense).__name__}.")
        for attack in attacks or ():
            if not isinstance(attack, Attack):
                raise InputError(f"`attacks` must be gradguard.attacks.Attack objects, got {type(attack).__name__}.")
        self.defense = defense
        self.attacks = DEFAULT_ATTACKS if attacks is None else tuple(attacks)
        self.policy = policy or Policy()
        self.threat = threat or ThreatModel()
        self.train_mode: TrainMode = train_mode
        self.max_iterations = max_iterations
        if uncovered not in ("noise", "refuse"):
            raise InputError(f'`uncovered` must be "noise" or "refuse", got {uncovered!r}.')
        self.uncovered: Uncovered = uncovered

    def __repr__(self) -> str:
        return (
            f"Guard(defense={self.defense}, attacks={list(self.attacks)}, policy={self.policy}, threat={self.threat})"
        )

    # ------------------------------------------------------------------ the ways in

    def audit(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        targets: Tensor,
        *,
        sent: Any = None,
        class_names: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> LeakageReport:
        """What the gradient of this batch gives away, as it is and as the defense sends it.

        `inputs`: `(B, *input_shape)` in the threat model's value range; `targets`: `(B, ...)`.
        `sent`: what was really sent, in any form that `as_gradient` takes (default: what the defense makes of the
        true gradient).
        `class_names`: for the report. `generator`: all randomness, of the defense and of the attacks.
        Raises what `LossGradient` raises, before any long work. An attack that cannot work on this model is no error:
        the report says why it did not run.
        """
        function = self.loss_gradient(model, loss_fn)
        with progress_bar(self._steps()) as advance:
            jacobian = InputJacobian(function, inputs, targets)
            true = function(inputs, targets)
            if sent is None:
                sent = self._defended(true, jacobian, generator)
            else:
                sent = as_gradient(model, sent)
            advance("measuring")
            measures = self.measure(jacobian, true, sent or true, generator=generator)
            eigenvalues = spectrum(jacobian, generator=generator).values
            attacked = self._most_exposed(measures)
            seed = _draw_seed(generator)
            scores: dict[str, dict] = {}
            labels: dict = {}
            for attack in self.attacks:
                for case, gradient in (("without", true), ("with", sent)):
                    if gradient is None:
                        continue
                    advance(f"{attack.name} {case} the defense")
                    # The same seed for both cases: what differs is the defense, not the attack's luck.
                    score = score_attack(attack, jacobian, true, gradient, attacked, threat=self.threat, seed=seed)
                    if isinstance(score, LabelScore):
                        labels[case] = score
                    else:
                        scores.setdefault(attack.name, {})[case] = score
        report = LeakageReport(
            model=type(model).__name__,
            defense=repr(self.defense) if self.defense else None,
            input_shape=tuple(inputs.shape[1:]),
            labels=[int(t) for t in targets.flatten(1)[:, 0]] if targets.ndim > 1 else [int(t) for t in targets],
            class_names=tuple(class_names),
            attacked=attacked,
            gradient_norm=norm(true).item(),
            noise_ratio=measures.noise_ratio,
            predicted_error=measures.predicted_error.tolist(),
            predicted_converged=measures.converged.tolist(),
            lower_bound=measures.lower_bound.tolist(),
            lambda_max=measures.lambda_max.tolist(),
            spectrum=eigenvalues.tolist(),
            attacks=scores,
            label_recovery=labels,
            prior_psnr=prior_psnr(jacobian.inputs, attacked, threat=self.threat),
            environment=environment(function),
            extra={"threat": asdict(self.threat)},
            originals=inputs.detach()[attacked].cpu(),
        )
        return replace(report, verdict=self.judge_report(report, defended=sent is not None))

    def protect(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        targets: Tensor,
        gradient: Any = None,
        *,
        training: LocalTraining | None = None,
        declared: Defense | None = None,
        missing: Missing = "error",
        foreign: float = FOREIGN,
        verify: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Gradient | None, Verdict]:
        """The pre-send check: what to send instead of `gradient`, and why.

        Only declared randomness protects. What `gradient` differs by from the batch's true gradient hides nothing
        unless a defense drew it: factors, masks, rounding, clipping, weight decay and whatever gradguard cannot explain
        count as known to the attacker, and the verdict names them.

        Args:
            model: at the weights that the message was computed at.
            loss_fn: `(outputs, targets) -> scalar`.
            inputs: `(B, *input_shape)`: exactly the examples that the message is of.
            targets: `(B, ...)`.
            gradient: what is about to be sent, in any form that `as_gradient` takes. Default: the batch's true
                gradient, or what `training` makes of it.
            training: how the client trained, where the message is an update (`after - before` or `before - after`, at
                any scale) or the gradient of a regularised loss (`steps=1`). It is judged by the gradient at its
                starting point, to first order in the learning rate.
            declared: the defense that the message already went through. What it differs by then counts as that noise,
                if its size fits; that it was drawn, and from a secret, is your word.
            missing: "error" refuses a message that lacks trainable parameters, "unsent" counts them as not sent.
            foreign: a message that is farther than this from all that explains it, relative to the explanation's norm,
                is refused: it is of another batch or of other weights.
            verify: run the guard's attacks too; the verdict then rests on measures and attacks, else on measures alone.
            generator: all randomness, of the defense and of the attacks.

        Returns:
            The message to send, keyed as `named_parameters()` in the scale it was given in, and a verdict: "send" (as
            given it meets the policy), "perturb" (the defended one does), or "block" (neither does; the message is then
            `None`). `verdict.noise_ratio` is of the noise alone, relative to the gradient.

        Raises:
            ForeignMessageError: an `InputError`, for a message that is not of this batch at these weights; it says what
                the message looks like.
        """
        function = self.loss_gradient(model, loss_fn)
        message = read_message(
            function, inputs, targets, gradient, training=training, declared=declared, missing=missing, foreign=foreign
        )
        jacobian = InputJacobian(function, message.inputs, message.targets, validate=False)
        measures, ratio = self._judged(message, message.given, jacobian, verify, generator)
        complaints = (*self.policy.complaints(measures), *bare_tensors(message))
        if not complaints:
            reasons = ("the gradient as given meets the policy", *message.sentences, *message.caveats)
            return message.given, self._verdict("send", reasons, ratio, measures, message)
        if self.defense is None:
            reasons = (*complaints, *message.sentences, "the guard has no defense to perturb it with")
            return None, self._verdict("block", reasons, ratio, measures, message)
        covered = cover(
            self.defense, message.in_gradient_units(), jacobian, uncovered=self.uncovered, generator=generator
        )
        sent = message.in_its_own(covered.message)
        measures, ratio = self._judged(
            message, message.in_its_own(covered.message, masked=False), jacobian, verify, generator
        )
        remaining = self.policy.complaints(measures)
        if remaining:
            reasons = (*remaining, f"even after {self._defense_name()}", *message.sentences)
            return None, self._verdict("block", reasons, ratio, measures, message)
        reasons = (
            *(f"as given, {c}" for c in complaints),
            f"after {self._defense_name()} it meets the policy",
            *message.sentences,
            *covered_sentences(message, covered),
            *message.caveats,
        )
        return sent, self._verdict("perturb", reasons, ratio, measures, message)

    def _judged(
        self,
        message: Message,
        sent: Gradient,
        jacobian: InputJacobian,
        verify: bool,
        generator: torch.Generator | None,
    ) -> tuple[dict[str, float], float]:
        """The measures of sending `sent` and its noise ratio, against an attacker who knows all but the noise."""
        seen = message.seen(sent)
        measures = self._judged_measures(jacobian, message.true, seen, verify, generator)
        return measures, _noise_ratio(message.true, seen)

    @staticmethod
    def _verdict(
        decision: Decision, reasons: tuple[str, ...], ratio: float, measures: dict[str, float], message: Message
    ) -> Verdict:
        caveats = () if decision == "block" else _caveats(measures)
        verdict = Verdict(decision=decision, reasons=(*reasons, *caveats), noise_ratio=ratio, measures=measures)
        return message.named(verdict)

    # ------------------------------------------------------------------ the parts, for loops of one's own

    def loss_gradient(self, model: nn.Module, loss_fn: LossFunction) -> LossGradient:
        """The pure gradient that this guard measures: in at least float32, whatever the model's dtype."""
        function = LossGradient(model, loss_fn, train_mode=self.train_mode)
        return function.with_dtype(torch.float32) if function.computing_dtype.itemsize < 4 else function

    def perturb(
        self, jacobian: InputJacobian | None, gradient: Gradient, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`gradient` as the defense sends it; itself without a defense. `jacobian` only where the defense needs one."""
        return self._defended(gradient, jacobian, generator) or gradient

    def measure(
        self,
        jacobian: InputJacobian,
        true: Gradient,
        sent: Gradient,
        *,
        exact: bool = True,
        tolerance: float = 0.1,
        confidence: float | None = 0.999,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Measures:
        """The closed-form measures of sending `sent` where `true` is the batch's gradient.

        `exact`: solve for the influence itself, in float64 where the Jacobian is small enough to be formed; `False`
        leaves it at the lower bound (a training loop's step). `tolerance`, `confidence`, `start`: of the bound, see
        `influence_lower_bound`; `start` takes the `vectors` of an earlier measurement.
        """
        delta = add({n: sent[n].to(g) for n, g in true.items()}, true, -1.0)
        bound = influence_lower_bound(
            jacobian, delta, tolerance=tolerance, confidence=confidence, start=start, generator=generator
        )
        predicted, converged = bound.value, bound.converged
        if exact:
            answer = influence(jacobian, delta, max_iterations=min(jacobian.size, self.max_iterations))
            predicted, converged = answer.value, answer.converged
        return Measures(predicted, converged, bound.value, bound.lambda_max, _noise_ratio(true, sent), bound.vectors)

    def judge_report(self, report: LeakageReport, *, defended: bool) -> Verdict:
        """The policy's verdict on what an audit found: of the gradient as sent (`defended`), or of the bare one."""
        case: Case = "with" if defended else "without"
        per_element = (math.prod(report.input_shape) ** 0.5) * self._span()
        # `sorted` and `min` would let a NaN pass or not by its place; the tensor's minimum is NaN if any is.
        measures = {
            "predicted_error": torch.tensor(report.predicted_error, dtype=torch.float64).min().item() / per_element
        }
        psnr = [p for cases in report.attacks.values() if case in cases for p in cases[case].psnr]
        if psnr:
            measures["attacked_psnr"] = max(psnr)
        if case in report.label_recovery:
            measures["label_recovery"] = report.label_recovery[case].i_rec
        complaints = self.policy.complaints(measures)
        if complaints:
            return Verdict(
                decision="block", reasons=tuple(complaints), noise_ratio=report.noise_ratio, measures=measures
            )
        reason = f"the gradient {'as sent' if defended else 'as it is'} meets the policy"
        decision: Decision = "perturb" if defended else "send"
        return Verdict(decision=decision, reasons=(reason,), noise_ratio=report.noise_ratio, measures=measures)

    # ------------------------------------------------------------------ inside

    def _defended(
        self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator | None
    ) -> Gradient | None:
        if self.defense is None:
            return None
        return cover(self.defense, gradient, jacobian, uncovered=self.uncovered, generator=generator).message

    def _defense_name(self) -> str:
        return self.defense.name if self.defense else "no defense"

    def _span(self) -> float:
        low, high = self.threat.value_range
        return high - low

    def _steps(self) -> int:
        return 1 + len(self.attacks) * (2 if self.defense else 1)

    def _most_exposed(self, measures: Measures) -> list[int]:
        """Indices of the examples to attack: lowest predicted error first; without noise, steepest gradient first."""
        if not self.threat.others_known:
            return list(range(len(measures.lambda_max)))
        key = measures.predicted_error if measures.noise_ratio > 0 else -measures.lambda_max
        return key.argsort()[: self.threat.max_attacked].tolist()

    def _judged_measures(
        self, jacobian: InputJacobian, true: Gradient, sent: Gradient, verify: bool, generator: torch.Generator | None
    ) -> dict[str, float]:
        """The numbers that a policy judges, of the worst example and the best attack."""
        found = self.measure(jacobian, true, sent, generator=generator)
        per_element = found.predicted_error / (jacobian.size**0.5 * self._span())
        measures = {"predicted_error": per_element.min().item()}
        if not verify:
            return measures
        attacked, seed = self._most_exposed(found), _draw_seed(generator)
        for attack in self.attacks:
            score = score_attack(attack, jacobian, true, sent, attacked, threat=self.threat, seed=seed)
            if isinstance(score, LabelScore):
                measures["label_recovery"] = max(score.i_rec, measures.get("label_recovery", 0.0))
            elif score.psnr:
                measures["attacked_psnr"] = max(*score.psnr, measures.get("attacked_psnr", float("-inf")))
        return measures


@contextmanager
def progress_bar(total: int) -> Iterator:
    """A progress bar on the terminal's standard error, gone when it ends; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal
    ) as progress:
        task = progress.add_task("auditing", total=total)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        yield advance


def environment(function: LossGradient) -> dict[str, str]:
    """Versions, device, dtype and date: what a number was measured with."""
    return {
        "gradguard": version("gradguard"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(function.device),
        "dtype": str(function.computing_dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
    }


def _caveats(measures: dict[str, float]) -> tuple[str, ...]:
    """What a verdict in favour does not rest on."""
    return () if "attacked_psnr" in measures else ("no attack on the inputs has run: this rests on the measures alone",)


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _noise_ratio(true: Gradient, sent: Gradient) -> float:
    difference = add({n: sent[n].to(g) for n, g in true.items()}, true, -1.0)
    return (norm(difference) / norm(true).clamp_min(torch.finfo(norm(true).dtype).tiny)).item()
