"""H-GAP on real pictures: exact where the layers below decide, R-GAP where nothing is open, honest otherwise."""

import pytest
import torch
from torch import nn

from gradguard.attacks import HGAP, RGAP, Observation
from gradguard.attacks.hgap import linearise, null_space
from gradguard.chain.links import leaky_relu
from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import add, norm
from gradguard.linalg import LinearOperator
from gradguard.zoo import models
from references import psnr

BCE = nn.BCEWithLogitsLoss()
CE = nn.CrossEntropyLoss()


def observe(model, loss, x, y, *, dtype=torch.float64, labels=True, noise=0.0):
    """What an attacker sees of the gradient of `x`, computed in `dtype`; `noise`: relative to its norm."""
    sent = LossGradient(model, loss, dtype=dtype)(x, y)
    if noise:
        generator = torch.Generator().manual_seed(0)
        drawn = {n: torch.randn(g.shape, generator=generator, dtype=dtype) for n, g in sent.items()}
        sent = add(sent, drawn, noise * norm(sent) / norm(drawn))
    known = y if labels else None
    return Observation(loss_gradient=LossGradient(model, loss), sent=sent, input_shape=x.shape[1:], labels=known)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def narrow(*, first=3, second=4, activation=nn.LeakyReLU, slope=0.2, bias=True):
    """For 8x8 digits; the second layer determines 43 F - F^2 of its 64 `first` unknowns."""
    act = (lambda: activation(slope)) if activation is nn.LeakyReLU else activation
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1, bias=bias),
        act(),
        nn.Conv2d(first, second, 3, stride=2, padding=1, bias=bias),
        act(),
        nn.Flatten(),
        nn.Linear(16 * second, 10),
    )


def digit(digit_pictures, index):
    return digit_pictures.images[index : index + 1], digit_pictures.labels[index : index + 1]


@pytest.mark.parametrize("index", [3, 10, 57])
@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Tanh])
def test_a_narrow_layer_is_seen_through(digit_pictures, activation, index):
    x, y = digit(digit_pictures, index)
    observation = observe(seeded(lambda: narrow(activation=activation), index), CE, x, y, labels=False)
    plain, result = RGAP()(observation), HGAP()(observation)
    assert psnr(plain.inputs, x) < 20
    assert not plain.converged
    assert psnr(result.inputs, x) > 100
    assert result.converged
    assert result.matching_loss < 1e-15
    assert torch.equal(result.labels, y)
    assert result.details["deficient"] == ["2"]
    row = result.details["layers"][0]
    assert row["deficit"] + row["constraints"] == row["unknowns"] == 192
    assert row["deficit"] >= 192 - row["rank_bound"] == 36
    assert row["undecided"] == 0 < row["undecided_at_first"]
    assert "determine them" in result.details["note"]


@pytest.mark.parametrize("index", [3, 10])
def test_two_activations_below(digit_pictures, index):
    x, y = digit(digit_pictures, index)
    inside = narrow(first=3, second=4)
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 3, 3, padding=1), *inside[1:]
        )
    )
    observation = observe(model, CE, x, y)
    plain, result = RGAP()(observation), HGAP()(observation)
    assert not plain.converged
    assert result.converged
    assert psnr(result.inputs, x) > 100
    assert result.details["deficient"] == ["4"]


def test_without_biases_both_brightnesses_are_candidates(digit_pictures):
    x = digit_pictures.images[3:4]
    model = seeded(lambda: nn.Sequential(*narrow(bias=False)[:-1], nn.Linear(64, 1, bias=False)))
    result = HGAP()(observe(model, BCE, x, torch.tensor([[1.0]]), labels=False))
    assert psnr(result.inputs, x) > 100
    assert result.converged


def test_it_draws_no_random_numbers(digit_pictures):
    x, y = digit(digit_pictures, 3)
    observation = observe(seeded(narrow), CE, x, y)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    first, second = (HGAP()(observation, generator=g) for g in generators)
    assert torch.equal(first.inputs, second.inputs)


def test_without_a_deficit_it_is_rgap(digit_pictures):
    x, y = digit(digit_pictures, 5)
    observation = observe(seeded(lambda: models.digits_convnet(activation="leaky_relu")), CE, x, y)
    plain, result = RGAP()(observation), HGAP()(observation)
    assert torch.allclose(plain.inputs, result.inputs, rtol=0, atol=1e-6)  # R-GAP ends its iterations earlier
    assert plain.converged
    assert result.converged
    assert result.details["deficient"] == []
    counts = ("layer", "unknowns", "weight_constraints", "gradient_constraints", "rank_bound", "crossed")
    pairs = zip(result.details["layers"], plain.details["layers"], strict=True)
    assert all(ours[name] == theirs[name] for ours, theirs in pairs for name in counts)


def test_more_than_the_layers_below_can_know_is_not_called_converged(digit_pictures):
    x, y = digit(digit_pictures, 5)
    observation = observe(seeded(lambda: narrow(second=1)), CE, x, y)
    plain, result = RGAP()(observation), HGAP()(observation)
    row = result.details["layers"][0]
    assert row["deficit"] > 128  # more than the virtual constraints
    assert not result.converged
    assert not row["determined"]
    assert psnr(result.inputs, x) > psnr(plain.inputs, x)
    assert "do not determine" in result.details["note"]


def test_a_first_layer_that_is_short_is_filled_in_by_the_prior(digit_pictures):
    x, y = digit(digit_pictures, 5)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(16, 10)))
    plain, result = (attack(observe(model, CE, x, y)) for attack in (RGAP(), HGAP()))
    assert psnr(result.inputs, x) > psnr(plain.inputs, x)
    assert result.details["layers"][0]["deficit"] >= 64 - 25
    assert result.details["layers"][0]["rounds"] == 1
    assert not result.converged


@pytest.mark.parametrize("noise", [1e-2, 10.0])
def test_a_noisy_gradient_is_not_called_converged(digit_pictures, noise):
    x, y = digit(digit_pictures, 3)
    result = HGAP()(observe(seeded(narrow), CE, x, y, noise=noise))
    assert result.inputs.isfinite().all()
    assert not result.converged


def test_single_precision(digit_pictures):
    x, y = digit(digit_pictures, 3)
    result = HGAP()(observe(seeded(narrow), CE, x, y, dtype=torch.float32))
    assert psnr(result.inputs, x) > 40


def test_wide_layers_keep_the_plain_solution(digit_pictures):
    x, y = digit(digit_pictures, 3)
    observation = observe(seeded(narrow), CE, x, y)
    plain, result = RGAP()(observation), HGAP(max_unknowns=191)(observation)
    assert torch.allclose(plain.inputs, result.inputs, rtol=0, atol=1e-6)  # R-GAP ends its iterations earlier
    assert not result.converged
    assert result.details["deficient"] == []


@pytest.mark.slow
def test_cnn6_d_gives_a_photograph_away(real_pictures):
    x = real_pictures("cifar10_2000").images[:1]
    observation = observe(seeded(lambda: models.cnn6(second_channels=20)), BCE, x, torch.tensor([[1.0]]))
    result = HGAP()(observation)
    assert psnr(result.inputs, x) > 120
    assert result.converged
    assert result.details["layers"][-2]["deficit"] == 280


@pytest.mark.parametrize(
    ("option", "value"),
    [("rounds", 0), ("max_unknowns", 0), ("tolerance", 0.0), ("damping", -1.0), ("max_iterations", 0)],
)
def test_bad_options(option, value):
    with pytest.raises(InputError, match=f"`{option}`"):
        HGAP(**{option: value})


# ---------------------------------------------------------------------- its parts


@pytest.mark.parametrize("expected", [0, 7, 30])
def test_null_space(expected):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 33, generator=generator, dtype=torch.float64) for n in (90, 63))
    matrix = left @ right.mT  # rank 33 of 63
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    basis = null_space(LinearOperator.from_matrix(matrix[None]), expected, 1e-6)
    assert basis.shape == (63, 30)
    assert torch.allclose(basis.mT @ basis, torch.eye(30, dtype=torch.float64))
    assert (matrix @ basis).abs().max() < 1e-12


def test_the_best_line_through_leaky_relu():
    mean = torch.tensor([0.0, 1.0, -0.3, 5.0], dtype=torch.float64)
    std = torch.tensor([1.0, 2.0, 0.1, 0.5], dtype=torch.float64)
    slope, shift, off = linearise(leaky_relu(negative_slope=0.2), mean, std**2)
    # The slope is the mean derivative (Stein), 0.2 + 0.8 P(z > 0).
    positive = torch.special.ndtr(mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / (2 * torch.pi) ** 0.5
    assert torch.allclose(slope, 0.2 + 0.8 * positive, atol=0.02)  # quadrature over a kink
    average = 0.2 * mean + 0.8 * (mean * positive + std * density)
    assert torch.allclose(slope * mean + shift, average, atol=0.02)
    assert off[3] < 1e-12 < off[0]
