"""One judgement for `Guard.audit` and `Guard.protect`: does a gradient meet the policy, and does anything prove it?

An attack that fails on a defended gradient says something only if it works with the defense off. So every verdict in
favour is asked what it rests on: an attack that beats a guess on the bare gradient and ran on what is sent, or, where
none was to run, predictions that converged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradguard.attacks import Attack
from gradguard.attacks.adaptive import adaptive_attacks
from gradguard.evaluation.evidence import Evidence, Scores, measures_of, unproven
from gradguard.evaluation.measurement import MAX_ITERATIONS, Measures, difference, measure, noise_ratio
from gradguard.evaluation.scoring import guess_psnr, named, score_attack
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient
from gradguard.policy import Policy
from gradguard.report import LabelScore, Verdict
from gradguard.report.leakage_report import Decision
from gradguard.threats.knowledge import Knowledge
from gradguard.threats.model import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a policy says of one gradient, and what that rests on.

    Args:
        measures: The numbers that were judged, and those they are compared with, by name.
        complaints: What is wrong, a sentence each.
        unproven: Why meeting the policy would prove nothing, a sentence each.
        caveats: What the verdict does not rest on or does not judge, a sentence each.
        noise_ratio: `|sent - true| / |true|`.
        scores: Of the attacks on what is sent.
        bare: Of the attacks on the bare gradient.
        accepted: Whether the policy accepts what is unproven.
    """

    measures: dict[str, float]
    complaints: tuple[str, ...]
    unproven: tuple[str, ...]
    caveats: tuple[str, ...]
    noise_ratio: float
    scores: Scores
    bare: Scores
    accepted: bool = False

    @property
    def fine(self) -> bool:
        """Whether the gradient may be sent: no complaint, and proven, or accepted unproven by name."""
        return not self.complaints and (not self.unproven or self.accepted)

    def verdict(self, decision: Decision, *reasons: str, **fields: Any) -> Verdict:
        """A verdict on this gradient. In favour it is "unproven" if nothing proves it, and says what is not judged."""
        if decision != "block":
            reasons = (*reasons, *self.unproven, *self.caveats)
            if self.unproven and self.accepted:
                reasons = (*reasons, "unproven, and accepted by the policy")
            decision = decision if self.fine else "unproven"
        return Verdict(
            decision=decision, reasons=reasons, noise_ratio=self.noise_ratio, measures=self.measures, **fields
        )


def judge(policy: Policy, evidence: Evidence) -> Judgement:
    """What `policy` says of `evidence`."""
    measures = measures_of(evidence)
    caveats = policy.not_judged(measures)
    if not evidence.attacks_inputs:
        caveats.append("no attack on the inputs has run: this rests on the measures alone")
    return Judgement(
        measures=measures,
        complaints=tuple(policy.complaints(measures)),
        unproven=tuple(unproven(policy, evidence)),
        caveats=tuple(caveats),
        noise_ratio=evidence.noise_ratio,
        scores=evidence.sent,
        bare=evidence.bare,
        accepted=policy.accept_unproven,
    )


class Judge:
    """Judges gradients sent in the place of one batch's true gradient: the same attacks, from the same starts.

    Beside the attacks it is given it runs those that the defense's declaration of a message calls for
    (`gradguard.attacks.adaptive`): the score that counts is the best. Attacks on the bare gradient run once, when a
    verdict first needs them.

    Args:
        jacobian: Of the batch.
        true: Its bare gradient, one tensor per parameter.
        attacks: What to attack with.
        policy: What is asked of a gradient.
        threat: What the attacker knows.
        verify: Attack, too. `False` judges by the measures alone.
        prior: What inputs look like to an attacker who knows declared noise, see `gradguard.attacks.adaptive.MAP`.
        max_iterations: Of the influence solver, see `measure`.
        generator: All randomness.

    Raises:
        InputError: The batch lies outside the threat model's value range.
    """

    def __init__(
        self,
        jacobian: InputJacobian,
        true: Gradient,
        *,
        attacks: Sequence[Attack],
        policy: Policy,
        threat: ThreatModel,
        verify: bool = True,
        max_iterations: int = MAX_ITERATIONS,
        prior: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.jacobian, self.true, self.policy = jacobian, true, policy
        threat.check_inputs(jacobian.inputs)
        self.threat = threat
        self.attacks = named(attacks) if verify else {}
        self.max_iterations, self.prior = max_iterations, prior
        self.generator = generator
        # The same starts for every gradient: what differs is what is sent, not an attack's luck.
        self.seed = int(torch.randint(2**31, (), generator=generator))
        self._bare: tuple[list[int], Scores] | None = None

    def __call__(self, sent: Gradient, knowledge: Knowledge | None = None) -> Judgement:
        """The judgement of `sent`; of the bare gradient itself if it is the very same.

        Args:
            sent: The message.
            knowledge: What the defense declares of it, in its units.

        Returns:
            The judgement.
        """
        measures = measure(
            self.jacobian,
            difference(self.true, sent),
            max_iterations=self.max_iterations,
            noise_ratio=noise_ratio(self.true, sent),
            generator=self.generator,
        )
        attacked = most_exposed(measures, self.threat)
        scores = self.scores(sent, attacked, knowledge=knowledge)
        if sent is self.true or measures.noise_ratio == 0:
            self._bare = self._bare or (attacked, scores)
        judged = self._judged(measures, attacked, scores, Scores())
        if judged.complaints:
            return judged  # the bare gradient is attacked only where something is to be proven
        bare_attacked, bare = self.bare(attacked)
        return self._judged(measures, bare_attacked, scores, bare)

    def bare(self, attacked: Sequence[int]) -> tuple[list[int], Scores]:
        """Which examples were attacked on the bare gradient, and the scores: whether the attacks work at all."""
        if self._bare is None:
            self._bare = list(attacked), self.scores(self.true, attacked)
        return self._bare

    def scores(
        self,
        sent: Gradient,
        attacked: Sequence[int],
        before: Callable[[str], None] = lambda name: None,
        knowledge: Knowledge | None = None,
    ) -> Scores:
        """Every attack on one gradient, and those that `knowledge` of it calls for.

        Args:
            sent: The message.
            attacked: Indices of the examples.
            before: Is told the name of each of the given attacks before it runs.
            knowledge: What the defense declares of the message.

        Returns:
            The scores by the attacks' names.
        """
        found = Scores()
        given = list(self.attacks.values())
        adaptive = [] if knowledge is None else adaptive_attacks(knowledge, given, prior=self.prior)
        for name, attack in (self.attacks | named(adaptive)).items():
            if name in self.attacks:
                before(name)
            score = score_attack(
                attack,
                self.jacobian,
                self.true,
                sent,
                attacked,
                threat=self.threat,
                seed=self.seed,
                knowledge=knowledge,
            )
            if isinstance(score, LabelScore):
                found.labels[name] = score
            else:
                found.inputs[name] = score
        return found

    def _judged(self, measures: Measures, attacked: Sequence[int], sent: Scores, bare: Scores) -> Judgement:
        low, high = self.threat.range_of(self.jacobian.inputs)
        evidence = Evidence(
            predicted_error=measures.predicted_error.tolist(),
            converged=(measures.converged & ~measures.traceless).tolist(),
            size=self.jacobian.size,
            span=high - low,
            noise_ratio=measures.noise_ratio,
            sent=sent,
            bare=bare,
            guess_psnr=guess_psnr(self.jacobian.inputs, attacked, threat=self.threat) if self.attacks else (),
            attacks=self.attacks,
        )
        return judge(self.policy, evidence)


def most_exposed(measures: Measures, threat: ThreatModel) -> list[int]:
    """Which examples to attack.

    Args:
        measures: Of the batch, `(R,)` each.
        threat: With `others_known=False` all examples are attacked.

    Returns:
        Indices into the batch, `threat.max_attacked` at most: lowest predicted error first; without noise, largest
            `lambda_max` first.
    """
    if not threat.others_known:
        return list(range(len(measures.lambda_max)))
    key = measures.predicted_error if measures.noise_ratio > 0 else -measures.lambda_max
    return key.argsort()[: threat.max_attacked].tolist()
