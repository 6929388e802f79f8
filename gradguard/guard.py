"""The pipeline: measure a gradient, perturb it, attack it, judge it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.attacks import DLG, ILRG, RGAP, Attack
from gradguard.defenses import Defense
from gradguard.defenses.coverage import Uncovered, cover
from gradguard.defenses.release import Release
from gradguard.errors import InputError, SeededNoiseWarning
from gradguard.evaluation.evidence import Scores, by_attack, evidence_of
from gradguard.evaluation.judgement import Judge, judge, most_exposed
from gradguard.evaluation.measurement import MAX_ITERATIONS, Measures, difference, measure, noise_ratio
from gradguard.evaluation.messages import FOREIGN, bare_tensors, covered_sentences, read_message
from gradguard.evaluation.scoring import guess_psnr, prior_psnr
from gradguard.functional.as_gradient import Missing, as_gradient
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode
from gradguard.functional.precision import full_precision
from gradguard.functional.structures import targets_of
from gradguard.functional.vectors import Gradient, norm
from gradguard.functional.whole_batch import take
from gradguard.leakage import spectrum
from gradguard.policy import Policy
from gradguard.report import LeakageReport, Verdict
from gradguard.report.leakage_report import Case
from gradguard.report.scores import best_labels
from gradguard.storage.environment import environment as environment_of
from gradguard.storage.progress import Bar, progress_bar
from gradguard.threats.knowledge import Knowledge
from gradguard.threats.model import ThreatModel

#: What an audit attacks with unless told otherwise: one closed form, one optimisation, one for the labels.
DEFAULT_ATTACKS: tuple[Attack, ...] = (RGAP(), DLG(), ILRG())


class Guard:
    """Measure, perturb, attack, judge.

    Args:
        defense: What to add to a gradient. `None`: nothing.
        attacks: What to prove it with. Default: R-GAP, DLG and iLRG. `()`: none, so that verdicts rest on the
            closed-form measures alone.
        policy: What is asked of a gradient. Default: `Policy()`.
        threat: What the attacker knows. Default: `ThreatModel()`.
        train_mode: What to do with modules that mix examples or are random in training mode, see `LossGradient`.
        max_iterations: Iterations of the influence solver on inputs too large for a dense Jacobian, at most. If the
            limit is reached, the prediction is too low, the report says that it did not converge, and a verdict that
            rests on it is "unproven".
        uncovered: What becomes of tensors of a message that the defense leaves as they are. "noise" covers them with
            isotropic noise at the same ratio, "refuse" raises (see `gradguard.defenses.coverage`).
        input_module: The name of the module that looks tokens up, see `LossGradient`.
        private: Which leaf of the inputs is private where they are a tuple or a mapping, see `LossGradient`.

    Raises:
        InputError: `defense` is no `Defense`, one of `attacks` is no `Attack`, or `uncovered` is none of its values.
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
        uncovered: Uncovered = "noise",
        input_module: str | None = None,
        private: str | int | None = None,
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
        self.input_module, self.private = input_module, private

    def __repr__(self) -> str:
        return (
            f"Guard(defense={self.defense}, attacks={list(self.attacks)}, policy={self.policy}, threat={self.threat})"
        )

    # ------------------------------------------------------------------ the ways in

    @full_precision()
    def audit(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any,
        *,
        sent: Any = None,
        class_names: Sequence[str] = (),
        generator: torch.Generator | None = None,
        noise: torch.Generator | None = None,
    ) -> LeakageReport:
        """What the gradient of this batch gives away, as it is and as the defense sends it.

        Args:
            model: At the weights that the gradient is of.
            loss_fn: `(outputs, targets) -> scalar`.
            inputs: `(B, *input_shape)` in the threat model's value range, or a structure (see `LossGradient.bind`).
            targets: `(B, ...)`.
            sent: What was really sent, in any form that `as_gradient` takes (default: what the defense makes of the
                true gradient).
            class_names: For the report.
            generator: All randomness, of the defense and of the attacks (default: the noise is secret, and the attacks
                start from the same numbers each time).
            noise: The source of the defense's noise alone.

        Returns:
            The report. An attack that cannot work on this model is no error: the report says why it did not run.

        Raises:
            InputError: What `LossGradient` raises, and for inputs outside the value range, before any long work.
        """
        function, inputs, targets = take(self.loss_gradient(model, loss_fn), inputs, targets)
        starts = _starts(generator)
        with progress_bar("auditing", self._steps()) as bar:
            jacobian = InputJacobian(function, inputs, targets)
            self.threat.check_inputs(inputs)
            true = function(inputs, targets)
            if sent is None:
                # Nothing of it leaves: a seed for the noise of an audit is no fault, and no warning.
                sent = self._audited(true, jacobian, generator if noise is None else noise)
            else:
                sent = as_gradient(model, sent, missing="unsent")
            bar.step("measuring")
            measures = self.measure(jacobian, true, sent or true, generator=starts)
            eigenvalues = spectrum(jacobian, generator=starts).values
            attacked = most_exposed(measures, self.threat)
            judging = self._judge(jacobian, true, True, starts)
            found: dict[Case, Scores] = {}
            gradients: dict[Case, Gradient | None] = {"without": true, "with": sent}
            for case, gradient in gradients.items():
                if gradient is not None:
                    known = self._knowledge(jacobian, true, gradient) if case == "with" else None
                    found[case] = judging.scores(gradient, attacked, _announcing(bar, case), known)
        best = {case: best_labels(scores.labels) for case, scores in found.items()}
        report = LeakageReport(
            model=type(model).__name__,
            defense=repr(self.defense) if self.defense else None,
            input_shape=tuple(inputs.shape[1:]),
            labels=_first_labels(targets_of(targets), len(inputs)),
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

    @full_precision()
    def protect(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any,
        gradient: Any = None,
        *,
        training: LocalTraining | None = None,
        declared: Defense | None = None,
        missing: Missing = "error",
        foreign: float = FOREIGN,
        verify: bool = True,
        generator: torch.Generator | None = None,
        noise: torch.Generator | None = None,
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
            generator: all randomness, for tests: noise that is really sent must be secret, which it is by default.
            noise: the source of the defense's noise alone, such as `NoiseStream.message()`.

        Returns:
            The message to send, keyed as `named_parameters()` in the scale it was given in, and a verdict: "send" (as
            given it meets the policy), "perturb" (the defended one does), "block" (neither does), or "unproven" (one
            does, and nothing proves it: no attack works on the bare gradient either, or the predictions did not
            converge; `Policy(accept_unproven=True)` lets it pass). The message is `None` for the last two.
            `verdict.noise_ratio` is of the noise alone, relative to the gradient.

        Raises:
            ForeignMessageError: an `InputError`, for a message that is not of this batch at these weights; it says what
                the message looks like.
        """
        function, inputs, targets = take(self.loss_gradient(model, loss_fn), inputs, targets)
        starts = _starts(generator)
        message = read_message(
            function, inputs, targets, gradient, training=training, declared=declared, missing=missing, foreign=foreign
        )
        self.threat.check_inputs(message.inputs)
        jacobian = InputJacobian(function, message.inputs, message.targets)
        judge_of = self._judge(jacobian, message.true, verify, starts)
        # What an attacker makes of the message who knows all but the noise is what is measured and attacked.
        judged = judge_of(message.seen(message.given, fill_unsent=False))
        sentences = (*message.sentences, *_known_inputs(function))
        complaints = (*judged.complaints, *bare_tensors(message))
        if not complaints:
            reasons = ("the gradient as given meets the policy", *sentences, *message.caveats)
            verdict = message.named(judged.verdict("send", *reasons))
            return message.given if judged.fine else None, verdict
        if self.defense is None:
            reasons = (*complaints, *judged.caveats, *sentences, "the guard has no defense to perturb it with")
            return None, message.named(judged.verdict("block", *reasons))
        source = generator if noise is None else noise
        covered = cover(self.defense, message.in_gradient_units(), jacobian, uncovered=self.uncovered, generator=source)
        sent = message.in_its_own(covered.message)
        seen = message.seen(message.in_its_own(covered.message, masked=False), fill_unsent=False)
        judged = judge_of(seen, self._knowledge(jacobian, message.in_gradient_units(), covered.message))
        if judged.complaints:
            reasons = (*judged.complaints, *judged.caveats, f"even after {self._defense_name()}", *sentences)
            return None, message.named(judged.verdict("block", *reasons))
        reasons = (
            *(f"as given, {c}" for c in complaints),
            f"after {self._defense_name()} it meets the policy",
            *sentences,
            *covered_sentences(message, covered),
            *message.caveats,
        )
        verdict = message.named(judged.verdict("perturb", *reasons))
        return sent if judged.fine else None, verdict

    # ------------------------------------------------------------------ the parts, for loops of one's own

    def loss_gradient(self, model: nn.Module, loss_fn: LossFunction) -> LossGradient:
        """The pure gradient that this guard measures: in at least float32, whatever the model's dtype.

        Args:
            model: At the weights that the gradient is of.
            loss_fn: `(outputs, targets) -> scalar`.

        Returns:
            The loss gradient, with the guard's `train_mode`, `input_module` and `private`.

        Raises:
            InputError: What the constructor of `LossGradient` raises.
        """
        function = LossGradient(
            model, loss_fn, train_mode=self.train_mode, input_module=self.input_module, private=self.private
        )
        return function.with_dtype(torch.float32) if function.computing_dtype.itemsize < 4 else function

    def perturb(
        self, jacobian: InputJacobian | None, gradient: Gradient, *, generator: torch.Generator | None = None
    ) -> Gradient:
        """`gradient` as the defense sends it; itself without a defense.

        Args:
            jacobian: Where the defense needs one.
            gradient: One tensor per parameter.
            generator: Of the noise; default: a new secret key. See `Defense.__call__`.

        Returns:
            What to send: every tensor covered, see `gradguard.defenses.coverage`.
        """
        if self.defense is None:
            return gradient
        return cover(self.defense, gradient, jacobian, uncovered=self.uncovered, generator=generator).message

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

        Args:
            jacobian: Of the batch, `R` problems.
            true: The batch's gradient, one tensor per parameter.
            sent: What is sent. It may lack parameters: what an attacker sees is measured.
            exact: Solve for the influence itself, in float64 where the Jacobian is small enough to be formed. `False`
                leaves `predicted_error` at the lower bound (a training loop's step).
            tolerance: Of the lower bound, relative, see `influence_lower_bound`.
            confidence: Of the lower bound, a probability or `None`, see `influence_lower_bound`.
            start: `(R, D)`, the `vectors` of an earlier measurement.
            generator: Draws the solvers' starts. Default: the same each time.

        Returns:
            The measures, one per problem.

        Raises:
            InputError: The inputs lie outside the threat model's value range, or nothing was sent.
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
            generator=_starts(generator),
        )

    def judge_report(self, report: LeakageReport, *, defended: bool) -> Verdict:
        """The policy's verdict on what an audit found.

        Args:
            report: Of an audit with this guard's attacks.
            defended: `True` judges the gradient as sent, `False` the bare one.

        Returns:
            "block" where there is a complaint; else "perturb" (`defended`) or "send"; "unproven" in the place of these
                two where nothing proves it.
        """
        judged = judge(self.policy, evidence_of(report, "with" if defended else "without", self.attacks))
        if judged.complaints:
            return judged.verdict("block", *judged.complaints, *judged.caveats)
        reason = f"the gradient {'as sent' if defended else 'as it is'} meets the policy"
        return judged.verdict("perturb" if defended else "send", reason)

    # ------------------------------------------------------------------ inside

    def _audited(
        self, gradient: Gradient, jacobian: InputJacobian, generator: torch.Generator | None
    ) -> Gradient | None:
        if self.defense is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SeededNoiseWarning)
            return self.defense(gradient, jacobian, generator=generator)

    def _knowledge(self, jacobian: InputJacobian, gradient: Gradient, sent: Gradient) -> Knowledge | None:
        """What the defense declares of `sent`, so that attacks who know it are run too."""
        if self.defense is None or set(sent) != set(gradient):
            return None
        return self.defense.knowledge(Release.of(jacobian, gradient), sent)

    def _defense_name(self) -> str:
        return self.defense.name if self.defense else "no defense"

    def _steps(self) -> int:
        return 1 + len(self.attacks) * (2 if self.defense else 1)

    def _judge(self, jacobian: InputJacobian, true: Gradient, verify: bool, generator: torch.Generator) -> Judge:
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


def _announcing(bar: Bar, case: Case) -> Callable[[str], None]:
    """What tells the bar which attack runs on which gradient."""
    return lambda name: bar.step(f"{name} {case} the defense")


def environment(function: LossGradient) -> dict[str, str]:
    """Versions, device, dtype and date: what a number was measured with."""
    return environment_of(function.device, function.computing_dtype)


def _starts(generator: torch.Generator | None) -> torch.Generator:
    """Where attacks and solvers draw their starts from, which are no secret: never the global random state."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def _first_labels(targets: Tensor | None, count: int) -> list[int]:
    """One whole number per example for the report: its class, the first of several; -1 where there is none."""
    if targets is None or targets.is_complex():
        return [-1] * count
    first = targets.flatten(1)[:, 0] if targets.ndim > 1 else targets
    return [int(t) for t in first]


def _known_inputs(function: LossGradient) -> tuple[str, ...]:
    """What a verdict says of inputs beside the private one."""
    if not function.known_inputs:
        return ()
    return (f"the inputs {', '.join(function.known_inputs)} are taken as known to the attacker, and not protected",)
