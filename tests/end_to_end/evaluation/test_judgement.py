"""Audit and protect judge alike: what is kept, what counts, and what proves nothing: real digits, told attacks."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from gradguard import Guard, InputError, LossGradient, Policy, ThreatModel
from gradguard.attacks import DLG, ILRG, RGAP, Attack
from gradguard.defenses import GaussianNoise
from gradguard.evaluation.scoring import guess_psnr, named
from gradguard.report.scores import AttackScore, best_psnr, best_ssim, highest, lowest
from gradguard.threats.observation import Reconstruction

NOISE = GaussianNoise(noise_ratio=30.0)
NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Told(Attack):
    """Answers `bare` to a bare gradient and `noisy` to any other: a number fills, an error is raised."""

    truth: object
    loss_gradient: object
    bare: object = "truth"
    noisy: object = 0.0

    def run(self, observation, generator):
        x = self.truth[int(observation.labels)]  # the first four digits are 0, 1, 2 and 3
        own = self.loss_gradient(x[None], observation.labels)
        distance = sum((observation.sent[n].to(g) - g).square().sum().item() for n, g in own.items())
        answer = self.bare if distance < 1e-10 else self.noisy
        if isinstance(answer, Exception):
            raise answer
        return Reconstruction(
            attack=self.name, inputs=x[None].clone() if isinstance(answer, str) else torch.full_like(x[None], answer)
        )


@dataclass(frozen=True, kw_only=True)
class Labels(Attack):
    """Answers these label counts, whatever it sees."""

    recovers_inputs: ClassVar[bool] = False
    counts: tuple

    def run(self, observation, generator):
        return Reconstruction(attack=self.name, label_counts=torch.tensor(self.counts))


@dataclass(frozen=True, kw_only=True)
class MoreLabels(Labels):
    """Another attack on labels."""


ALL = (1, 1, 1, 1, 0, 0, 0, 0, 0, 0)  # the labels of the four digits: 0, 1, 2, 3
HALF = (2, 2, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture
def told(convnet, cross_entropy, batch):
    return lambda **options: Told(truth=batch[0], loss_gradient=LossGradient(convnet, cross_entropy), **options)


@pytest.fixture
def verdicts(convnet, cross_entropy, batch):
    """The verdicts of audit and protect on the digits' gradient."""

    def run(*attacks, defense=NOISE, policy=None, **options):
        guard = Guard(defense=defense, attacks=attacks, policy=policy, **options)
        seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
        audited = guard.audit(convnet, cross_entropy, *batch, generator=seeded[0]).verdict
        sent, protected = guard.protect(convnet, cross_entropy, *batch, generator=seeded[1])
        assert (sent is None) == (protected.decision in ("block", "unproven"))
        assert audited.decision == protected.decision
        return audited, protected

    return run


# ---------------------------------------------------------------------- what proves something, and what does not


def test_an_attack_that_works_bare_and_fails_on_what_is_sent_is_proof(verdicts, told):
    for verdict in verdicts(told()):
        assert verdict.decision == "perturb"
        assert "unproven" not in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("bare", "words"),
    [
        (0.5, r"Told gets \d\.\d dB from the bare gradient, where a guess gets"),
        (InputError("no such layer"), r"Told cannot run on the bare gradient \(no such layer\)"),
        (
            RuntimeError("broken"),
            r"Told cannot run on the bare gradient \(Told cannot work on .*RuntimeError: broken\)",
        ),
    ],
)
def test_an_attack_that_fails_without_a_defense_proves_nothing(verdicts, told, bare, words):
    import re

    for verdict in verdicts(told(bare=bare)):
        assert verdict.decision == "unproven"
        assert re.search(words, " ".join(verdict.reasons)), verdict.reasons


def test_one_attack_that_works_is_enough(verdicts, told):
    for verdict in verdicts(told(bare=0.5), told(noisy=0.1)):
        assert verdict.decision == "perturb"


def test_an_attack_that_breaks_on_what_is_sent_proves_nothing(verdicts, told):
    for verdict in verdicts(told(noisy=RuntimeError("singular"))):
        assert verdict.decision == "unproven"
        reasons = " ".join(verdict.reasons)
        assert "works on the bare gradient and cannot run on what is sent (Told cannot work on" in reasons
        assert "RuntimeError: singular)" in reasons


def test_the_policy_may_accept_it_by_name(verdicts, told):
    for verdict in verdicts(told(bare=0.5), policy=Policy(accept_unproven=True)):
        assert verdict.decision == "perturb"
        assert "from the bare gradient, where a guess gets" in " ".join(verdict.reasons)
        assert verdict.reasons[-1] == "unproven, and accepted by the policy"


def test_a_complaint_is_not_lifted_by_accepting(verdicts, told):
    for verdict in verdicts(told(bare=0.5, noisy="truth"), policy=Policy(accept_unproven=True)):
        assert verdict.decision == "block"


def test_predictions_that_did_not_converge_prove_nothing(verdicts, told, monkeypatch):
    import gradguard.evaluation.measurement as measurement

    monkeypatch.setattr(measurement, "DENSE_SIZE", 1)
    alone = verdicts(max_iterations=1)
    assert {v.decision for v in alone} == {"unproven"}
    assert all("did not converge" in " ".join(v.reasons) for v in alone)
    assert {v.decision for v in verdicts(told(), max_iterations=1)} == {"perturb"}  # the attack is proof


def test_unverified_predictions_that_did_not_converge_prove_nothing(convnet, cross_entropy, batch, monkeypatch):
    import gradguard.evaluation.measurement as measurement

    guard = Guard(defense=NOISE, attacks=(RGAP(),), max_iterations=1)
    assert guard.protect(convnet, cross_entropy, *batch, verify=False)[1].decision == "perturb"
    monkeypatch.setattr(measurement, "DENSE_SIZE", 1)
    sent, verdict = guard.protect(convnet, cross_entropy, *batch, verify=False)
    assert (sent, verdict.decision) == (None, "unproven")


def test_where_the_gradient_has_no_derivative_nothing_is_predicted(cross_entropy, batch):
    """J is 0 (dead units here; rounding does the same to an input that the gradient shows): no number, no proof."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double()
    with torch.no_grad():
        model[1].bias.fill_(-100)
    sent, verdict = Guard(defense=NOISE, attacks=()).protect(model, cross_entropy, *batch)
    assert (sent, verdict.decision) == (None, "unproven")
    assert "4 of 4 predicted errors did not converge or cannot be predicted" in " ".join(verdict.reasons)


def test_a_policy_that_asks_nothing_proves_nothing(verdicts):
    empty = Policy(minimum_predicted_error=None, maximum_attacked_psnr=None, maximum_attacked_ssim=None)
    assert {v.decision for v in verdicts(policy=empty)} == {"unproven"}


def test_attacks_that_the_policy_does_not_judge_need_no_proof(verdicts, told):
    only_predicted = Policy(maximum_attacked_psnr=None, maximum_attacked_ssim=None)
    assert {v.decision for v in verdicts(told(bare=0.5), policy=only_predicted)} == {"perturb"}


def test_the_bare_gradient_is_attacked_with_the_same_start(told, convnet, cross_entropy, batch):
    """A message that is noisy already: protect attacks the true gradient too, once, and only to prove something."""
    calls = []

    class Counting(Told):
        def run(self, observation, generator):
            calls.append(generator.initial_seed())
            return super().run(observation, generator)

    attack = Counting(truth=batch[0], loss_gradient=LossGradient(convnet, cross_entropy))
    true = LossGradient(convnet, cross_entropy)(*batch)
    noisy = NOISE(true, generator=torch.Generator().manual_seed(0))
    guard = Guard(attacks=(attack,), threat=ThreatModel(max_attacked=1))
    _, verdict = guard.protect(convnet, cross_entropy, *batch, noisy, declared=NOISE)
    assert verdict.decision == "send"
    assert verdict.measures["bare_attacked_psnr"] > 100
    assert len(calls) == 2
    assert len(set(calls)) == 1


# ---------------------------------------------------------------------- labels


def test_all_attacks_on_labels_are_kept_and_the_best_is_judged(convnet, cross_entropy, batch):
    policy = Policy(maximum_label_recovery=0.75)
    for attacks in ((Labels(counts=ALL), MoreLabels(counts=HALF)), (Labels(counts=HALF), MoreLabels(counts=ALL))):
        guard = Guard(defense=NOISE, attacks=attacks, policy=policy)
        report = guard.audit(convnet, cross_entropy, *batch)
        assert set(report.label_attacks) == {"Labels", "MoreLabels"}
        assert report.label_recovery["with"].i_rec == 1.0
        protected = guard.protect(convnet, cross_entropy, *batch)[1]
        for verdict in (report.verdict, protected):
            assert verdict.decision == "block"
            assert verdict.measures["label_recovery"] == 1.0
        assert json.loads(report.to_json())["label_attacks"]["Labels"]["with"]["i_rec"] in (0.5, 1.0)


def test_every_verdict_says_that_labels_are_not_judged(verdicts, told):
    sentence = "labels are not judged (100% of them are recovered): set maximum_label_recovery"
    for attacks, decision in (
        ((told(), Labels(counts=ALL)), "perturb"),
        ((told(noisy="truth"), Labels(counts=ALL)), "block"),
        ((told(bare=0.5), Labels(counts=ALL)), "unproven"),
    ):
        for verdict in verdicts(*attacks):
            assert verdict.decision == decision
            assert sentence in verdict.reasons


def test_a_judged_limit_on_labels_without_an_attack_that_works_is_unproven(verdicts, told):
    policy = Policy(maximum_label_recovery=0.5)
    for attacks, words in (
        ((told(),), "the policy judges labels and no attack on labels has run"),
        ((told(), Labels(counts=(0,) * 9 + (4,))), "Labels recovers 0% of the bare gradient's, a guess 40%"),
    ):
        for verdict in verdicts(*attacks, policy=policy):
            assert verdict.decision == "unproven"
            assert words in " ".join(verdict.reasons)


# ---------------------------------------------------------------------- names


def test_attacks_of_one_class_have_names_of_their_own():
    attacks = (DLG(), DLG(restarts=8), DLG(restarts=8, evaluations=10), RGAP())
    assert list(named(attacks)) == ["DLG", "DLG(restarts=8)", "DLG(restarts=8, evaluations=10)", "RGAP"] or set(
        named(attacks)
    ) == {"DLG", "DLG(restarts=8)", "DLG(evaluations=10, restarts=8)", "RGAP"}
    assert list(named((DLG(restarts=8), RGAP()))) == ["DLG", "RGAP"]
    assert list(named((RGAP(), ILRG(), RGAP()))) == ["RGAP #1", "ILRG", "RGAP #2"]
    assert named(()) == {}


def test_no_attack_of_one_class_overwrites_another(told, convnet, cross_entropy, batch):
    attacks = (told(noisy=0.1), told(noisy="truth"))
    for order in (attacks, attacks[::-1]):
        report = Guard(defense=NOISE, attacks=order).audit(convnet, cross_entropy, *batch)
        assert set(report.attacks) >= set(named(attacks))  # and what the noise calls for
        assert report.verdict.decision == "block"
        assert report.best_psnr("with") > 100


# ---------------------------------------------------------------------- numbers


def test_a_nan_is_never_hidden():
    assert math.isnan(highest([1.0, NAN, 3.0]))
    assert math.isnan(highest([NAN, 1.0]))
    assert math.isnan(lowest([1.0, NAN]))
    assert highest([1.0, 3.0]) == 3.0
    assert highest([]) is lowest([]) is None
    scores = [AttackScore(psnr=[1.0, 2.0], ssim=[NAN, NAN]), AttackScore(psnr=[NAN, 0.0], ssim=[NAN, NAN])]
    assert math.isnan(best_psnr(scores))
    assert best_ssim(scores) is None  # no pictures
    assert math.isnan(best_ssim([AttackScore(ssim=[0.2, NAN])]))


def test_a_nan_of_any_attack_blocks():
    assert Policy().complaints({"attacked_psnr": best_psnr([AttackScore(psnr=[1.0, NAN])])})
    assert Policy().complaints({"attacked_ssim": NAN})


def test_recognisability_is_judged(verdicts, told):
    """A copy of a lower contrast: below the limit in dB, and a digit that anyone reads."""

    class Faded(Told):
        def run(self, observation, generator):
            found = super().run(observation, generator)
            return Reconstruction(attack=self.name, inputs=0.8 * found.inputs)

    base = told(noisy="truth")
    faded = Faded(truth=base.truth, loss_gradient=base.loss_gradient, noisy="truth")
    blocked = verdicts(faded, policy=Policy(maximum_attacked_psnr=25.0))
    for verdict in blocked:
        assert verdict.decision == "block"
        assert verdict.measures["attacked_psnr"] < 25
        assert "recognisable, at an SSIM of" in verdict.reasons[0]
    off = Policy(maximum_attacked_psnr=25.0, maximum_attacked_ssim=None)
    assert {v.decision for v in verdicts(faded, policy=off)} == {"perturb"}
    assert any("SSIM" in r and "not judged" in r for r in verdicts(faded, policy=off)[0].reasons)


def test_inputs_that_are_no_pictures_have_no_ssim(cross_entropy, batch, told):
    torch.manual_seed(0)
    model, flat = nn.Linear(64, 10).double(), batch[0].flatten(1)
    attack = Told(truth=flat, loss_gradient=LossGradient(model, cross_entropy))
    report = Guard(defense=NOISE, attacks=(attack,)).audit(model, cross_entropy, flat, batch[1])
    assert "attacked_ssim" not in report.verdict.measures
    assert report.verdict.decision == "perturb"


def test_the_guess_is_the_better_of_two(batch):
    x = batch[0]
    others = torch.stack([x[[j for j in range(4) if j != i]].mean(0) for i in range(4)])
    by_hand = [
        max(-10 * math.log10((g - t).square().mean()) for g in (o, torch.full_like(t, 0.5)))
        for o, t in zip(others, x, strict=True)
    ]
    assert guess_psnr(x, range(4), threat=ThreatModel()) == pytest.approx(by_hand, rel=1e-9)
    wide = guess_psnr(255 * x, [2], threat=ThreatModel(value_range=(0, 255)))
    assert wide == pytest.approx(by_hand[2:3], rel=1e-6)
