import json

import pytest
import torch
from torch import nn

from gradguard import Guard, InputError, InputJacobian, Policy, ThreatModel
from gradguard.attacks import DLG, ILRG, RGAP
from gradguard.defenses import GaussianNoise, PriorNoise
from gradguard.evaluation.scoring import observe
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import add, flatten, norm
from gradguard.leakage import influence
from gradguard.zoo.models import digits_convnet

ATTACKS = (RGAP(), DLG(restarts=2), ILRG())
#: Enough for a bare gradient.
SHORT = DLG(restarts=1, evaluations=60, polish=5)


@pytest.fixture(scope="module")
def guard():
    return Guard(defense=PriorNoise(), attacks=ATTACKS, threat=ThreatModel(max_attacked=2))


@pytest.fixture(scope="module")
def report(guard, digit_pictures):
    """The audit of four digits, made once for all that look at it."""
    torch.manual_seed(0)
    batch = digit_pictures.images[:4].double(), digit_pictures.labels[:4]
    generator = torch.Generator().manual_seed(0)
    return guard.audit(digits_convnet().double(), nn.CrossEntropyLoss(), *batch, generator=generator)


def test_an_audit_shows_the_attack_and_the_defense(report):
    for name in ("RGAP", "DLG"):
        assert min(report.attacks[name]["without"].psnr) > 100
        assert max(report.attacks[name]["with"].psnr) < 25
    assert report.noise_ratio == pytest.approx(0.5)
    assert report.label_recovery["without"].i_rec == 1.0
    assert all(b <= p for b, p in zip(report.lower_bound, report.predicted_error, strict=True))
    assert report.predicted_converged == [True] * 4
    assert len(report.spectrum[0]) == 64
    # The mean of three other digits is some 10 dB away: far below any attack without the defense.
    assert 5 < report.prior_psnr < 15


def test_the_most_exposed_examples_are_attacked(report):
    order = sorted(range(4), key=lambda i: report.predicted_error[i])
    assert report.attacked == order[:2]
    assert report.originals.shape == (2, 1, 8, 8)
    assert report.worst_example() in report.attacked


def test_the_report_carries_the_threat_model_and_is_json(report):
    again = json.loads(report.to_json())
    assert again["extra"]["threat"]["others_known"] is True
    assert again["attacks"]["DLG"]["without"]["psnr"] == pytest.approx(report.attacks["DLG"]["without"].psnr)
    assert "pictures" not in json.dumps(again)


def test_the_same_generator_gives_the_same_audit(guard, convnet, cross_entropy, batch):
    quick = Guard(defense=guard.defense, attacks=(ILRG(),))
    first, second = (
        quick.audit(convnet, cross_entropy, *batch, generator=torch.Generator().manual_seed(7)).to_dict()
        for _ in range(2)
    )
    assert first == second


def test_predicted_error_is_the_influence_of_what_was_added(guard, convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    jacobian = InputJacobian(function, *batch)
    true = function(*batch)
    sent = guard.perturb(jacobian, true, generator=torch.Generator().manual_seed(0))
    report = guard.audit(convnet, cross_entropy, *batch, sent=sent)
    expected = influence(jacobian, add(sent, true, -1.0)).value
    torch.testing.assert_close(torch.tensor(report.predicted_error).double(), expected, rtol=1e-5, atol=0)


def test_an_attacker_who_knows_the_others_sees_one_example_and_all_of_the_noise(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    jacobian, true = InputJacobian(function, *batch), function(*batch)
    delta = {n: torch.randn_like(g) for n, g in true.items()}
    seen = observe(jacobian, true, add(true, delta), [2], threat=ThreatModel())
    own = function(batch[0][2:3], batch[1][2:3])
    torch.testing.assert_close(flatten(add(seen.sent, own, -1.0)), 4 * flatten(delta))
    assert seen.batch_size == 1
    assert torch.equal(seen.labels, batch[1][2:3])


def test_the_whole_batch_can_be_attacked_as_one(convnet, cross_entropy, batch):
    guard = Guard(attacks=(DLG(restarts=4),), threat=ThreatModel(others_known=False))
    report = guard.audit(convnet, cross_entropy, batch[0][:2], batch[1][:2], generator=torch.Generator().manual_seed(0))
    assert report.attacked == [0, 1]
    assert min(report.attacks["DLG"]["without"].psnr) > 60


def test_labels_are_inferred_where_the_attacker_does_not_have_them(convnet, cross_entropy, batch):
    guard = Guard(attacks=(DLG(restarts=4),), threat=ThreatModel(labels_known=False, max_attacked=1))
    report = guard.audit(convnet, cross_entropy, *batch, generator=torch.Generator().manual_seed(0))
    assert report.attacks["DLG"]["without"].psnr[0] > 60


def test_an_attack_that_cannot_run_says_why_in_the_report(cross_entropy, batch):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)).double()
    report = Guard(attacks=(RGAP(), ILRG())).audit(model, cross_entropy, *batch)
    assert "MaxPool2d" in report.attacks["RGAP"]["without"].failure
    assert report.attacks["RGAP"]["without"].psnr == []
    assert report.label_recovery["without"].i_rec > 0


def test_protect_perturbs_a_bare_gradient(guard, convnet, cross_entropy, batch):
    sent, verdict = guard.protect(convnet, cross_entropy, *batch, generator=torch.Generator().manual_seed(0))
    assert verdict.decision == "perturb"
    assert any("as given" in reason and "predicted error" in reason for reason in verdict.reasons)
    assert verdict.measures["attacked_psnr"] < 20
    true = LossGradient(convnet, cross_entropy)(*batch)
    assert (norm(add(sent, true, -1.0)) / norm(true)).item() == pytest.approx(0.5)
    assert verdict.noise_ratio == pytest.approx(0.5)


def test_protect_sends_what_is_noisy_enough_by_declaration(convnet, cross_entropy, batch):
    true = LossGradient(convnet, cross_entropy)(*batch)
    declared = GaussianNoise(noise_ratio=30.0)
    noisy = declared(true, generator=torch.Generator().manual_seed(0))
    # Attacks on thirty times the gradient's norm find nothing, and a search for it is soon cut short.
    guard = Guard(defense=PriorNoise(), attacks=(RGAP(), SHORT, ILRG()), threat=ThreatModel(max_attacked=2))
    sent, verdict = guard.protect(
        convnet, cross_entropy, *batch, noisy, declared=declared, generator=torch.Generator().manual_seed(0)
    )
    assert verdict.decision == "send"
    assert all(torch.equal(sent[n], g) for n, g in noisy.items())
    assert verdict.noise_ratio == pytest.approx(30, rel=0.05)
    assert any("taken on your word" in reason for reason in verdict.reasons)
    # Undeclared, it could as well be the gradient of something else.
    with pytest.raises(InputError, match="looks like the message of another batch or of other weights"):
        guard.protect(convnet, cross_entropy, *batch, noisy)


def test_a_factor_is_not_noise(convnet, cross_entropy, batch):
    guard = Guard(defense=PriorNoise(), attacks=(RGAP(),), threat=ThreatModel(max_attacked=1))
    true = LossGradient(convnet, cross_entropy)(*batch)
    halved = {n: 0.5 * g for n, g in true.items()}
    sent, verdict = guard.protect(convnet, cross_entropy, *batch, halved, generator=torch.Generator().manual_seed(0))
    assert verdict.decision == "perturb"
    assert any("0.5 times the true one, which hides nothing" in reason for reason in verdict.reasons)
    # What may be sent keeps the factor: half the gradient, with half its norm of noise on it.
    assert (norm(add(sent, halved, -1.0)) / norm(halved)).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("defense", [None, PriorNoise(noise_ratio=1e-3)])
def test_protect_blocks_what_it_cannot_mend(convnet, cross_entropy, batch, defense):
    guard = Guard(defense=defense, attacks=())
    sent, verdict = guard.protect(convnet, cross_entropy, *batch)
    assert sent is None
    assert verdict.decision == "block"
    assert ("no defense" in verdict.reasons[-1]) == (defense is None)


def test_verify_is_what_the_attacks_cost(guard, convnet, cross_entropy, batch):
    _, verdict = guard.protect(convnet, cross_entropy, *batch, verify=False)
    assert "attacked_psnr" not in verdict.measures
    assert "label_recovery" not in verdict.measures
    assert "no attack on the inputs has run" in verdict.reasons[-1]


def test_a_policy_on_labels_blocks(convnet, cross_entropy, batch):
    guard = Guard(defense=PriorNoise(), attacks=(ILRG(),), policy=Policy(maximum_label_recovery=0.0))
    _, verdict = guard.protect(convnet, cross_entropy, *batch, generator=torch.Generator().manual_seed(0))
    assert verdict.decision == "block"
    assert "labels are recovered" in " ".join(verdict.reasons)


def test_half_precision_models_are_measured_in_float32(cross_entropy, batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.bfloat16)
    report = Guard(attacks=()).audit(model, cross_entropy, batch[0].bfloat16(), batch[1])
    assert report.environment["dtype"] == "float32"
    assert model[1].weight.dtype == torch.bfloat16


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"`defense` must be a gradguard\.defenses\.Defense, got float"):
        Guard(defense=0.1)
    with pytest.raises(InputError, match="`attacks` must be"):
        Guard(attacks=[DLG])
