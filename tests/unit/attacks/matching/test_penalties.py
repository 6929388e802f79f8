"""Penalties on trials, each against a plain second form."""

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import GradientMatching, GradInversion, Observation
from gradguard.attacks._matching.penalties import (
    BatchNormStatistics,
    GaussianPrior,
    GroupConsistency,
    SquaredNorm,
    TotalVariation,
)
from gradguard.attacks._matching.trials import Trials
from gradguard.linalg.covariances import PowerLawPrior


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(144, 10)),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def trials(model, batch):
    x, y = batch[0][:2], batch[1][:2]
    function = LossGradient(model, nn.CrossEntropyLoss())
    seen = Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), batch_size=2, labels=y)
    return Trials([seen, seen], restarts=3, labels=torch.stack([y, y]))


@pytest.fixture
def inputs():
    return torch.rand(6, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_squared_norm(trials, inputs):
    found = SquaredNorm(weight=2.0)(inputs, trials)
    for trial in range(6):
        torch.testing.assert_close(found[trial], 2 * (inputs[trial] ** 2).mean())


def test_total_variation_is_weighted(trials, inputs):
    torch.testing.assert_close(
        TotalVariation(weight=3.0)(inputs, trials), 3 * TotalVariation(weight=1.0).of(inputs, trials)
    )


def test_the_gaussian_prior_is_its_quadratic_form(trials, inputs):
    prior = PowerLawPrior(std=0.3)
    columns = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    covariance = prior.apply(columns).reshape(64, 64)
    found = GaussianPrior(weight=1.0, prior=prior)(inputs, trials)
    for trial in range(6):
        centred = (inputs[trial] - 0.5).reshape(2, 64)
        expected = (centred @ torch.linalg.inv(covariance) * centred).sum() / (2 * 64)
        torch.testing.assert_close(found[trial], expected, rtol=1e-8, atol=0)
    drawn = 0.5 + prior.sqrt(torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double())
    assert GaussianPrior(weight=1.0, prior=prior).of(drawn[None], trials).item() == pytest.approx(1, abs=0.02)


def test_batch_norm_statistics(model, trials, inputs):
    found = BatchNormStatistics(weight=0.5)(inputs, trials)
    for trial in range(6):
        first = model[0](inputs[trial])
        second = model[3](model[2](model[1](first)))
        expected = 0.0
        for factor, x, module in ((10.0, first, model[1]), (1.0, second, model[4])):
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            expected = expected + factor * (mean - module.running_mean).norm()
            expected = expected + factor * (variance - module.running_var).norm()
        torch.testing.assert_close(found[trial], 0.5 * expected)


def test_group_consistency_looks_at_the_same_picture_only(trials, inputs):
    found = GroupConsistency(weight=1.0)(inputs, trials)
    for trial in range(6):
        group = inputs[:3] if trial < 3 else inputs[3:]
        torch.testing.assert_close(found[trial], ((inputs[trial] - group.mean(0)) ** 2).mean())


@pytest.mark.parametrize(
    "penalty",
    [SquaredNorm(weight=1.0), TotalVariation(weight=1.0), GaussianPrior(weight=1.0), BatchNormStatistics(weight=1.0)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_derivatives(trials, inputs, penalty):
    """Of the whole objective, by differences."""
    trials.penalties = (penalty,)
    rows, points = torch.arange(6), inputs.flatten(1)
    direction = torch.randn(points.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, gradient = trials.value_and_gradient(points, rows)
    step = 1e-6
    ahead, behind = (trials.value_and_gradient(points + sign * step * direction, rows)[0] for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(1), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


def test_without_batch_norm_there_are_no_statistics(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    seen = Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), labels=y)
    attack = GradientMatching(regularisers=(BatchNormStatistics(weight=1.0),))
    with pytest.raises(InputError, match="has no BatchNorm with running statistics"):
        attack(seen)
    with pytest.raises(InputError, match="`weight` must be finite and not negative"):
        SquaredNorm(weight=-1.0)


def test_grad_inversion_finds_a_digit(model, digit_pictures):
    x, y = digit_pictures.images[3:4].double(), digit_pictures.labels[3:4]
    function = LossGradient(model, nn.CrossEntropyLoss())
    seen = Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), labels=y)
    attack = GradInversion(iterations=400, restarts=1, batch_norm=1e-5, total_variation=1e-5)
    found = attack(seen, generator=torch.Generator().manual_seed(0))
    error = (found.inputs.double() - x).square().mean()
    assert error < 0.1 * (x - x.mean()).square().mean()
