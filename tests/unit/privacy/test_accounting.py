"""Accountants against the libraries and the closed form; the ledger; claims."""

import json
import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

import gradguard.defenses as gd
from gradguard.errors import InputError
from gradguard.privacy import (
    BudgetExhaustedError,
    OpacusAccountant,
    PrivacyLedger,
    StreamAccountant,
    epsilon,
    noise_multiplier_for,
)


def exact(multiplier, delta):
    """Balle and Wang 2018, Theorem 8."""

    def gap(eps):
        a, b = 1 / (2 * multiplier), eps * multiplier
        return norm.cdf(a - b) - math.exp(eps) * norm.cdf(-a - b) - delta

    return brentq(gap, 0, 100)


@pytest.mark.parametrize("sample_rate", [None, 0.01])
def test_fresh_noise_costs_what_opacus_says(sample_rate):
    from opacus.accountants import RDPAccountant

    theirs = RDPAccountant()
    for _ in range(20):
        theirs.step(noise_multiplier=1.3, sample_rate=sample_rate or 1.0)
    ours = epsilon(1.3, 1e-5, accountant=OpacusAccountant(rounds=20, sample_rate=sample_rate))
    assert ours == pytest.approx(theirs.get_epsilon(delta=1e-5), rel=1e-12)


def test_the_multiplier_is_opacus_own():
    from opacus.accountants.utils import get_noise_multiplier

    theirs = get_noise_multiplier(
        target_epsilon=3, target_delta=1e-5, sample_rate=0.02, steps=200, epsilon_tolerance=1e-4
    )
    accountant = OpacusAccountant(rounds=200, sample_rate=0.02)
    ours = noise_multiplier_for(3, 1e-5, accountant=accountant)
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert 2.98 < accountant.epsilon(ours, 1e-5) <= 3


@pytest.mark.parametrize("sensitivity", [1.0, 2.5])
@pytest.mark.parametrize("budget", [0.5, 4.4])
def test_a_stream_is_one_gaussian_event(sensitivity, budget):
    accountant = StreamAccountant(sensitivity=sensitivity)
    multiplier = noise_multiplier_for(budget, 1e-5, accountant=accountant)
    assert accountant.epsilon(multiplier, 1e-5) <= budget
    assert exact(multiplier / sensitivity, 1e-5) == pytest.approx(budget, rel=5e-3)


def test_no_noise_costs_infinity():
    assert OpacusAccountant(rounds=1).epsilon(0, 1e-5) == math.inf
    assert StreamAccountant().epsilon(0, 1e-5) == math.inf


def test_the_ledger_stops_before_the_budget_is_passed_and_survives_json():
    one = OpacusAccountant(rounds=2).epsilon(2.0, 1e-5)
    ledger = PrivacyLedger(noise_multiplier=2.0, delta=1e-5, budget=one * 1.001)
    ledger.record(["a", "b"])
    ledger.record(["a"])
    ledger = PrivacyLedger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    with pytest.raises(BudgetExhaustedError, match="'a'"):
        ledger.record(["b", "a"])
    assert ledger.participations == {"a": 2, "b": 1}
    assert ledger.worst == ledger.epsilon("a") == pytest.approx(one)
    assert ledger.exhausted(["a", "b", "c"]) == ["a"]
    with pytest.raises(InputError):
        PrivacyLedger.from_dict({})


def test_a_claim_needs_everything():
    run = {"delta": 1e-5, "rounds": 10}
    private = gd.DPSGD(max_norm=1.0, noise_multiplier=2.0)
    found = gd.claim(private.start(secure=True), **run)
    assert found.epsilon == OpacusAccountant(rounds=10).epsilon(2.0, 1e-5)
    clip, noise = private.steps
    for other, reason in (
        (private.start(), "secure"),
        (noise, "clip per example"),
        (clip, "no noise"),
        (gd.Compose(steps=(clip, gd.Noise(strength=gd.Std(value=1.0)))), "not relative"),
        (gd.Compose(steps=(gd.ClipPerExample(max_norm=1.0, quantile=0.5), noise)), "follows the data"),
        (gd.Pruning(fraction=0.5), "clip per example"),
        (gd.DPSGD(max_norm=1.0, noise_multiplier=0.0), "no noise"),
    ):
        options = {} if not isinstance(other, gd.Defense) else {"secure": True}
        got = gd.claim(other, **run, **options)
        assert got.epsilon is None
        assert reason in str(got)
        assert str(got).startswith("not differentially private")
    assert gd.claim(private, **run, secure=True, sample_rate=0.1).epsilon is None


def test_epsilon_and_its_noise_agree():
    private = gd.DPSGD(max_norm=1.0, epsilon=2.0, delta=1e-5, rounds=30)
    assert gd.claim(private, delta=1e-5, rounds=30, secure=True).epsilon == pytest.approx(2.0, rel=5e-3)
    with pytest.raises(InputError):
        gd.DPSGD(max_norm=1.0, epsilon=2.0)
