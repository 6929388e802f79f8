"""The pipeline: measure a gradient, perturb it, attack it, judge it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from gradguard.attacks import DLG, ILRG, RGAP, Attack
from gradguard.defenses import Defense
from gradguard.errors import InputError
from gradguard.evaluation.evidence import Scores, by_attack, evidence_of
from gradguard.evaluation.judgement import Judge, Judgement, judge, most_exposed
from gradguard.evaluation.measurement import MAX_ITERATIONS, Measures, difference, measure, noise_ratio
from gradguard.evaluation.scoring import guess_psnr, prior_psnr
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode
from gradguard.functional.vectors import Gradient, flatten, norm
from gradguard.leakage import influence as influence  # an old name of this module
from gradguard.leakage import spectrum
from gradguard.policy import Policy
from gradguard.report import LeakageReport, Verdict
from gradguard.report.leakage_report import Case
from gradguard.report.scores import best_labels
from gradguard.storage.environment import environment as environment_of
from gradguard.storage.progress import Bar, progress_bar
from gradguard.threats.model import ThreatModel

#: What an audit attacks with unless told otherwise: one closed form, one optimisation, one for the labels.
DEFAULT_ATTACKS: tuple[Attack, ...] = (RGAP(), DLG(), ILRG())


class Guard:
    """Measure, perturb, attack, judge.

    `defense`: what to add to a gradient (`None`: nothing). `attacks`: what to prove it with (default: R-GAP, DLG and
    iLRG; `()` for none). `policy`: what is asked of a gradient. `threat`: what the attacker knows.
    `train_mode`: see `LossGradient`: what to do with modules that mix examples or are random in training mode.
    `max_iterations`: of the influence solver on inputs too large for a dense Jacobian; where it runs out, the
    prediction is too low, the report says that it did not converge, and a verdict that rests on it is "unproven".
    """

    def __init__(
        self,
        *,
        defense: Defense | None = None,
        attacks: Sequence[Attack] | None = None,
        policy: Policy | None = None,
        threat: ThreatModel | None = None,
        train_mode: TrainMode = "error",
        max_iterations: int = MAX_ITERATIONS,
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
        sent: Gradient | None = None,
        class_names: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> LeakageReport:
        """What the gradient of this batch gives away, as it is and as the defense sends it.

        `inputs`: `(B, *input_shape)` in the threat model's value range; `targets`: `(B, ...)`.
        `sent`: what was really sent, where that is known (default: what the defense makes of the true gradient).
        `class_names`: for the report. `generator`: all randomness, of the defense and of the attacks.
        Raises what `LossGradient` raises, and `InputError` for inputs outside the value range, before any long work. An
        attack that cannot work on this model is no error: the report says why it did not run.
        """
        self.threat.check_inputs(inputs)
        function = self.loss_gradient(model, loss_fn)
        with progress_bar("auditing", self._steps()) as bar:
            jacobian = InputJacobian(function, inputs, targets)
            true = function(inputs, targets)
            if sent is None:
                sent = self._defended(true, jacobian, generator)
            else:
                function.check_gradient(sent)
            bar.step("measuring")
            measures = self.measure(jacobian, true, sent or true, generator=generator)
            eigenvalues = spectrum(jacobian, generator=generator).values
            attacked = most_exposed(measures, self.threat)
            judging = self._judge(jacobian, true, True, generator)
            found: dict[Case, Scores] = {}
            gradients: dict[Case, Gradient | None] = {"without": true, "with": sent}
            for case, gradient in gradients.items():
                if gradient is not None:
                    found[case] = judging.scores(gradient, attacked, _announcing(bar, case))
        best = {case: best_labels(scores.labels) for case, scores in found.items()}
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
            predicted_converged=(measures.converged & ~measures.traceless).tolist(),
            lower_bound=measures.lower_bound.tolist(),
            lambda_max=measures.lambda_max.tolist(),
            spectrum=eigenvalues.tolist(),
            attacks=by_attack({case: scores.inputs for case, scores in found.items()}),
            label_attacks=by_attack({case: scores.labels for case, scores in found.items()}),
            label_recovery={case: score for case, score in best.items() if score is not None},
            prior_psnr=prior_psnr(jacobian.inputs, attacked, threat=self.threat),
            guess_psnr=guess_psnr(jacobian.inputs, attacked, threat=self.threat),
            environment=environment(function),
            extra={"threat": asdict(self.threat) | {"value_range": self.threat.range_of(inputs)}},
            originals=inputs.detach()[attacked].cpu(),
        )
        return replace(report, verdict=self.judge_report(report, defended=sent is not None))

    def protect(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        targets: Tensor,
        gradient: Gradient | None = None,
        *,
        verify: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Gradient | None, Verdict]:
        """The pre-send check: what to send instead of `gradient`, and why.

        `gradient`: what is about to be sent, one tensor per trainable parameter (default: the batch's true gradient).
        It may already be compressed or noisy: what it differs by from the true gradient counts as noise. If it is
        (nearly) a multiple of it (clipping, a loss scale), the factor is taken out first and the verdict says so.
        `verify`: run the guard's attacks too; the verdict then rests on measures and attacks, else on measures alone.

        Returns the gradient to send and a verdict: "send" (the gradient as given meets the policy), "perturb" (the
        defended one does), "block" (neither does), or "unproven" (one does, and nothing proves it: no attack works on
        the bare gradient either, or the predictions did not converge; `Policy(accept_unproven=True)` lets it pass). The
        gradient is `None` for the last two.
        """
        function = self.loss_gradient(model, loss_fn)
        self.threat.check_inputs(inputs)
        if gradient is not None:
            function.check_gradient(gradient)
        jacobian = InputJacobian(function, inputs, targets)
        true = function(inputs, targets)
        given = true if gradient is None else gradient
        factor = _common_factor(true, given)
        if factor != 1.0:
            # A factor hides nothing: whoever receives the gradient can take it out again.
            given = {n: g / factor for n, g in given.items()}
        judging = self._judge(jacobian, true, verify, generator)
        judged = judging(given)
        complaints = [*judged.complaints]
        if factor != 1.0 and complaints:
            complaints.append(f"the gradient is {factor:.3g} times the true one, which hides nothing")
        if not complaints:
            verdict = judged.verdict("send", "the gradient as given meets the policy")
            return (given if gradient is None else gradient) if judged.fine else None, verdict
        sent = self._defended(given, jacobian, generator)
        if sent is None:
            reasons = (*complaints, *judged.caveats)
            return None, judged.verdict("block", *reasons, "the guard has no defense to perturb it with")
        judged = judging(sent)
        if judged.complaints:
            reasons = (*judged.complaints, *judged.caveats)
            return None, judged.verdict("block", *reasons, f"even after {self._defense_name()}")
        reasons = (*(f"as given, {c}" for c in complaints), f"after {self._defense_name()} it meets the policy")
        allowed = {n: g * factor for n, g in sent.items()} if judged.fine else None
        return allowed, judged.verdict("perturb", *reasons)

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
        Raises `InputError` for inputs outside the threat model's value range.
        """
        self.threat.check_inputs(jacobian.inputs)
        return measure(
            jacobian,
            difference(true, sent),
            exact=exact,
            max_iterations=self.max_iterations,
            tolerance=tolerance,
            confidence=confidence,
            start=start,
            noise_ratio=noise_ratio(true, sent),
            generator=generator,
        )

    def judge_report(self, report: LeakageReport, *, defended: bool) -> Verdict:
        """The policy's verdict on what an audit found: of the gradient as sent (`defended`), or of the bare one."""
        judged = judge(self.policy, evidence_of(report, "with" if defended else "without", self.attacks))
        if judged.complaints:
            return judged.verdict("block", *judged.complaints, *judged.caveats)
        reason = f"the gradient {'as sent' if defended else 'as it is'} meets the policy"
        return judged.verdict("perturb" if defended else "send", reason)

    # ------------------------------------------------------------------ inside

    def _defended(
        self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator | None
    ) -> Gradient | None:
        return self.defense(gradient, jacobian, generator=generator) if self.defense else None

    def _defense_name(self) -> str:
        return self.defense.name if self.defense else "no defense"

    def _steps(self) -> int:
        return 1 + len(self.attacks) * (2 if self.defense else 1)

    def _judge(self, jacobian: InputJacobian, true: Gradient, verify: bool, generator: torch.Generator | None) -> Judge:
        """Judges gradients sent in the place of `true`: `judge(sent)` is a `Judgement`."""
        return Judge(
            jacobian,
            true,
            attacks=self.attacks,
            policy=self.policy,
            threat=self.threat,
            verify=verify,
            max_iterations=self.max_iterations,
            generator=generator,
        )

    def _judgement(
        self,
        jacobian: InputJacobian,
        true: Gradient,
        sent: Gradient,
        verify: bool = True,
        generator: torch.Generator | None = None,
    ) -> Judgement:
        """The judgement of one gradient; to judge several, keep one `_judge`: it attacks the bare gradient once."""
        return self._judge(jacobian, true, verify, generator)(sent)


def _announcing(bar: Bar, case: Case) -> Callable[[str], None]:
    """What tells the bar which attack runs on which gradient."""
    return lambda name: bar.step(f"{name} {case} the defense")


def environment(function: LossGradient) -> dict[str, str]:
    """Versions, device, dtype and date: what a number was measured with."""
    return environment_of(function.device, function.computing_dtype)


def _common_factor(true: Gradient, given: Gradient) -> float:
    """`c` where `given` is `c` times the true gradient up to a tenth of noise, else 1: noise is left as it is."""
    a, b = flatten(true), flatten({n: given[n].to(g) for n, g in true.items()})
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    factor = (a @ b / (a @ a).clamp_min(torch.finfo(a.dtype).tiny)).item()
    return factor if cosine > 0.995 and abs(factor - 1) > 0.01 else 1.0
