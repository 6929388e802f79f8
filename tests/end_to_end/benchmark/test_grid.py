"""Defenses side by side on real digits, with attacks that are cut short."""

import json
import math

import pytest
import torch

from gradguard import InputJacobian, LossGradient, ThreatModel
from gradguard.attacks import DLG, ILRG
from gradguard.benchmark import compare
from gradguard.defenses import GaussianNoise, PriorNoise, Pruning
from gradguard.functional.vectors import flatten

ATTACKS = (DLG(restarts=1, evaluations=60, polish=5), ILRG())
DEFENSES = (GaussianNoise(noise_ratio=0.3), PriorNoise(noise_ratio=0.5))
THREAT = ThreatModel(max_attacked=1)


def score(defense):
    """A training that says which defense it was given; at module level, so that processes can share it."""
    return 1.0 if defense is None else defense.noise_ratio


@pytest.fixture
def digits_batch(batch):
    return batch[0][:2], batch[1][:2]


def run(model, loss_fn, batch, defenses=DEFENSES, **options):
    options = {"attacks": ATTACKS, "threat": THREAT} | options
    return compare(model, loss_fn, *batch, defenses, **options)


def test_one_row_per_defense_in_order(convnet, cross_entropy, digits_batch, capsys, monkeypatch):
    found = run(convnet, cross_entropy, digits_batch, training=score)
    bare, gaussian, prior = found.rows
    assert [row.defense for row in found.rows] == ["none", *map(repr, DEFENSES)]
    assert [row.score for row in found.rows] == [1.0, 0.3, 0.5]

    # The bare gradient gives everything away.
    assert (bare.noise_ratio, bare.predicted_error) == (0.0, 0.0)
    assert bare.cosine == pytest.approx(1.0, abs=1e-12)
    assert bare.psnr["DLG"] == bare.best_psnr
    assert bare.best_psnr > 60
    assert bare.label_recovery == 1.0

    # 3.6%: five standard deviations of the length of Gaussian noise with 9,930 elements.
    assert gaussian.noise_ratio == pytest.approx(0.3, rel=0.036)
    assert prior.noise_ratio == pytest.approx(0.5, rel=1e-9)
    # Isotropic noise is almost orthogonal to the gradient: 1 / sqrt(1 + ratio^2).
    assert gaussian.cosine == pytest.approx(1 / math.sqrt(1 + 0.3**2), abs=0.02)
    assert prior.cosine < 0.99
    for row in (gaussian, prior):
        assert row.predicted_error > 0
        assert row.psnr["DLG"] <= row.best_psnr == max(row.psnr.values()) < 40  # MAP knows the noise
    assert prior.best_psnr < gaussian.best_psnr

    monkeypatch.setenv("COLUMNS", "240")  # in a narrow terminal the headings wrap
    found.print()
    printed = capsys.readouterr().out
    assert "best attack, dB" in printed
    assert "GaussianNoise" in printed


def test_the_cosine_is_that_of_the_gradient_that_is_attacked(convnet, cross_entropy, digits_batch):
    """Pruning needs no luck: its row can be computed by hand."""
    pruning = Pruning(fraction=0.9)
    row = run(convnet, cross_entropy, digits_batch, (pruning,), attacks=()).rows[1]
    true = LossGradient(convnet, cross_entropy)(*digits_batch)
    sent = pruning(true)
    expected = torch.nn.functional.cosine_similarity(flatten(sent), flatten(true), dim=0).item()
    assert row.cosine == pytest.approx(expected, rel=1e-12)
    difference = (flatten(sent) - flatten(true)).norm() / flatten(true).norm()
    assert row.noise_ratio == pytest.approx(difference.item(), rel=1e-12)
    # cos^2 + ratio^2 = 1 where what is sent is a part of the gradient.
    assert row.cosine**2 + row.noise_ratio**2 == pytest.approx(1.0, rel=1e-12)


def test_without_attacks_and_training_there_is_nothing_to_say_of_them(convnet, cross_entropy, digits_batch):
    for row in run(convnet, cross_entropy, digits_batch, attacks=()).rows:
        assert row.psnr == {}
        assert row.best_psnr is None
        assert row.label_recovery is None
        assert row.score is None


def test_to_dict_is_json(convnet, cross_entropy, digits_batch):
    found = run(convnet, cross_entropy, digits_batch, DEFENSES[:1], training=score)
    text = json.dumps(found.to_dict(), allow_nan=False)
    rows = json.loads(text)["rows"]
    assert [row["defense"] for row in rows] == ["none", repr(DEFENSES[0])]
    assert rows[1]["psnr"]["DLG"] == found.rows[1].best_psnr
    assert set(rows[0]) == {
        "defense",
        "noise_ratio",
        "cosine",
        "predicted_error",
        "psnr",
        "best_psnr",
        "label_recovery",
        "score",
    }


def test_two_workers_give_the_numbers_of_one(convnet, cross_entropy, digits_batch):
    options = {"defenses": DEFENSES[:1], "attacks": ATTACKS, "training": score, "seed": 3}
    one = run(convnet, cross_entropy, digits_batch, **options)
    two = run(convnet, cross_entropy, digits_batch, **options, workers=2)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a.defense == b.defense
        assert a.score == b.score
        assert a.noise_ratio == pytest.approx(b.noise_ratio, rel=1e-12)
        assert a.cosine == pytest.approx(b.cosine, rel=1e-12)
        assert a.predicted_error == pytest.approx(b.predicted_error, rel=1e-9)
        assert a.label_recovery == b.label_recovery
        # The bare gradient's picture is exact to the last bits, and their logarithm is not reproducible.
        if a.defense != "none":
            assert a.best_psnr == pytest.approx(b.best_psnr, abs=1e-3)
        else:
            assert min(a.best_psnr, b.best_psnr) > 60


def test_the_seed_decides_the_noise(convnet, cross_entropy, digits_batch):
    def error(seed):
        options = {"attacks": (), "seed": seed}
        return run(convnet, cross_entropy, digits_batch, DEFENSES[:1], **options).rows[1].predicted_error

    assert error(0) == error(0)
    assert error(0) != error(1)


def test_the_model_stays_as_it_was(convnet, cross_entropy, digits_batch):
    before = [p.detach().clone() for p in convnet.parameters()]
    state = torch.get_rng_state()
    run(convnet, cross_entropy, digits_batch, DEFENSES[:1], attacks=())
    assert all(torch.equal(p, q) for p, q in zip(convnet.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_predicted_error_is_the_worst_examples(convnet, cross_entropy, digits_batch):
    from gradguard.leakage import influence

    pruning = Pruning(fraction=0.5)
    row = run(convnet, cross_entropy, digits_batch, (pruning,), attacks=()).rows[1]
    function = LossGradient(convnet, cross_entropy)
    delta = pruning.checked_perturbation(function(*digits_batch))
    errors = influence(InputJacobian(function, *digits_batch), delta).value
    assert errors[0] != errors[1]
    assert row.predicted_error == pytest.approx(errors.min().item(), rel=1e-9)
