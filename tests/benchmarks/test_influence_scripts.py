"""What the influence benchmarks are made of: perturbations of a given influence, and an attack that goes on."""

import pytest
import torch

from gradguard import InputJacobian, LossGradient
from gradguard.attacks import Observation
from gradguard.defenses import GaussianNoise, Pruning
from gradguard.functional.vectors import add
from gradguard.leakage import influence
from influence_agreement import SMOOTH, Case, ContinuedDLG, moving, perturbations, pruned_fraction, resized
from reproduce_i2f import DEVIATION, MEAN, scores


@pytest.fixture
def problem(convnet, cross_entropy, batch):
    """A Jacobian, the gradient, the picture and its label."""
    function = LossGradient(convnet, cross_entropy)
    x, y = batch[0][:1], batch[1][:1]
    return InputJacobian(function, x, y), function(x, y), x, y


def test_every_perturbation_has_the_influence_it_is_scaled_to(problem):
    jacobian, true, x, _ = problem
    case = Case("", lambda: None, "grey", 8, 1, SMOOTH, None)
    length = x.norm().item()
    found = list(perturbations(jacobian, true, length, case, torch.Generator().manual_seed(0)))
    assert len({name for name, _ in found}) >= 4
    for name, delta in found:
        share = influence(jacobian, delta).value.item() / length
        if name.startswith("Pruning"):
            assert share <= 0.09
        else:
            assert min(abs(share / wanted - 1) for wanted in SMOOTH) < 1e-6


def test_pruning_stays_below_what_is_asked(problem):
    jacobian, true, _, _ = problem
    assert pruned_fraction(jacobian, true, 1e-12) is None
    for most in (0.01, 0.1, 1.0):
        fraction = pruned_fraction(jacobian, true, most)
        if fraction is not None:
            assert influence(jacobian, Pruning(fraction=fraction).perturbation(true)).value.item() <= most
    assert pruned_fraction(jacobian, true, 10.0) == 0.99


def test_an_attack_goes_on_from_its_own_solution(problem):
    jacobian, true, x, y = problem
    delta = moving(
        jacobian, GaussianNoise(noise_ratio=1.0).perturbation(true, generator=torch.Generator().manual_seed(0)), 1e-3
    )
    observation = Observation(
        loss_gradient=jacobian.gradient, sent=add(true, delta), input_shape=tuple(x.shape[1:]), labels=y
    )
    attack = ContinuedDLG(first=x[None], restarts=1, evaluations=1, polish=15)
    assert "first" not in repr(attack)  # a reconstruction is private data
    assert (attack(observation).inputs - x).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_pictures_are_brought_to_a_size(batch):
    assert resized(batch[0], 4).shape == (4, 1, 4, 4)
    assert torch.equal(resized(batch[0], 8), batch[0])
    larger = resized(batch[0], 28)
    assert larger.shape == (4, 1, 28, 28)
    assert 0 <= larger.min() <= larger.max() <= 1


def test_the_published_mse_is_clamped_and_in_normalised_units(batch):
    x = (batch[0][:1] - MEAN) / DEVIATION
    moved = x.clone()
    moved[0, 0, 0, 0] -= 10.0  # a black pixel, made blacker: clamped away
    assert x[0, 0, 0, 0] == -MEAN / DEVIATION
    moved[0, 0, 4, 4] -= 0.1
    found = scores(moved, x)
    expected = 0.1 if x[0, 0, 4, 4] - 0.1 > -MEAN / DEVIATION else 0.0
    assert found["MSE"] == pytest.approx(expected**2 / 64, rel=1e-6)
    assert found["distance"] == pytest.approx((100 + 0.01) ** 0.5, rel=1e-9)
