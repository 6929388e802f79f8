"""What the closed-form attacks claim: an input is called exact only where nothing else explains the gradient."""

import itertools
import math

import pytest
import torch
from torch import nn

from gradguard.attacks import HGAP, RGAP, SPEAR, Observation
from gradguard.functional.loss_gradient import LossGradient

CE = nn.CrossEntropyLoss()
BCE = nn.BCEWithLogitsLoss()
EXACT = 90  # dB


def psnr(found, true):
    return -10 * math.log10(max(float((found - true).double().square().mean()), 1e-40))


def mlp(*widths, bias=True):
    layers = [nn.Flatten()]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_head(model, change):
    with torch.no_grad():
        model[-1].weight.copy_(change(model[-1].weight))
    return model


MODELS = {
    "two classes": lambda: mlp(64, 100, 2),
    "two classes, deep": lambda: mlp(64, 100, 50, 2),
    "ten classes": lambda: mlp(64, 300, 10),
    "two classes, flat head": lambda: with_head(mlp(64, 100, 2), lambda w: 1e-7 * w),
    "ten classes, flat head": lambda: with_head(mlp(64, 300, 10), lambda w: 1e-7 * w),
    "head of rank one": lambda: with_head(mlp(64, 300, 10), lambda w: w[:, :1] @ w[:1]),
    "equal rows": lambda: with_head(mlp(64, 300, 4), lambda w: w[[0, 0, 1, 1]]),
    "one unit in between": lambda: mlp(64, 100, 1, 10),
    "two units": lambda: mlp(64, 2, 2),
    "no bias": lambda: mlp(64, 100, 2, bias=False),
    "one output": lambda: mlp(64, 100, 1),
    "squared error": lambda: mlp(64, 100, 2),
}


def attacked(attack, model, loss, x, y, *, labels=False, dtype=torch.float64):
    observation = Observation(
        loss_gradient=LossGradient(model, loss),
        sent=LossGradient(model, loss, dtype=dtype)(x, y),
        input_shape=x.shape[1:],
        batch_size=len(x),
        labels=y if labels else None,
    )
    return attack(observation, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attack", [RGAP(), HGAP(), SPEAR(max_samples=2000)], ids=lambda a: a.name)
@pytest.mark.parametrize("same", [False, True], ids=["all labels", "one label"])
def test_what_is_called_exact_is_an_example(digit_pictures, name, attack, same):
    for seed in range(3):
        torch.manual_seed(seed)
        model, loss = MODELS[name](), CE
        x = digit_pictures.images[3 * seed : 3 * seed + 2 + seed]
        y = digit_pictures.labels[3 * seed : 3 * seed + 2 + seed] % model[-1].out_features * (not same)
        if name == "one output":
            y, loss = (y + digit_pictures.labels[: len(y)] % 2 * (not same))[:, None].double(), BCE
        if name == "squared error":
            y, loss = torch.eye(2).double()[y], nn.MSELoss()
        if name == "two units" and (attack.name == "SPEAR" and len(x) > 2):
            continue  # refused: more examples than units
        result = attacked(attack, model, loss, x, y, labels=loss is not CE)
        quality = [max(psnr(found, true) for true in x) for found in result.inputs]
        assert min(quality[: result.details.get("exact", 0)], default=math.inf) > EXACT
        if result.converged:
            assert min(max(psnr(found, true) for found in result.inputs) for true in x) > EXACT


@pytest.mark.parametrize("name", ["two classes, deep", "ten classes"])
def test_what_can_be_proved_is_still_claimed(digit_pictures, name):
    torch.manual_seed(0)
    x, y = digit_pictures.images[:2], digit_pictures.labels[:2] % (2 if "two" in name else 10)
    result = attacked(RGAP(), MODELS[name](), CE, x, y)
    assert result.converged
    assert result.details["exact"] == 2
    assert result.matching_loss < 1e-20
    assert sorted(result.labels.tolist()) == sorted(y.tolist())


def test_given_labels_set_the_order_of_a_proved_batch(digit_pictures):
    torch.manual_seed(0)
    x, y = digit_pictures.images[:3], digit_pictures.labels[:3]
    result = attacked(RGAP(), MODELS["ten classes"](), CE, x, y, labels=True)
    assert result.converged
    assert min(psnr(found, true) for found, true in zip(result.inputs, x, strict=True)) > EXACT


def test_two_classes_leave_candidates_that_nothing_proves(digit_pictures):
    torch.manual_seed(0)
    x, y = digit_pictures.images[:4], digit_pictures.labels[:4] % 2
    result = attacked(RGAP(), MODELS["two classes"](), CE, x, y)
    assert not result.converged
    assert result.details["exact"] == 0
    assert result.details["candidates"] > 0
    assert "combinations" in result.details["note"]


@pytest.mark.parametrize("activation", [nn.Identity, nn.LeakyReLU, nn.Tanh])
def test_without_zeros_no_unit_is_one_example_s(digit_pictures, activation):
    """Under a flat head with equal rows all units agree on mixtures, and their gradient is nearly the sent one."""
    torch.manual_seed(101)
    model = with_head(mlp(64, 100, 10), lambda w: 1e-3 * w[[i // 2 for i in range(10)]])
    model[2] = activation()
    x, y = digit_pictures.images[:2], digit_pictures.labels[:2]
    result = attacked(RGAP(), model, CE, x, y, labels=True)
    assert result.details["exact"] == 0
    assert not result.converged


def test_a_pair_with_one_pattern_under_two_classes_is_not_a_pair_of_copies(digit_pictures):
    """Its gradient is that of two copies of the weighted mean, up to the curvature of the loss."""
    torch.manual_seed(0)
    model = with_head(mlp(64, 20, 2), lambda w: 1e-3 * w)
    x = digit_pictures.images[:1] + torch.tensor([0.0, 0.02]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(*(model[1](x.flatten(1)) > 0))
    result = attacked(SPEAR(), model, CE, x, torch.zeros(2, dtype=torch.int64))
    assert result.details["copies"] == 1
    assert not result.converged
    assert result.details["unproved"]


# ---------------------------------------------------------------------- one example


@pytest.mark.parametrize("attack", [RGAP(), HGAP()], ids=lambda a: a.name)
def test_pixels_that_no_filter_meets_are_not_called_known(digit_pictures, attack):
    """By count 8 filters at 16 positions are enough for 64 pixels; a stride of two skips three quarters of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 1, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 10))
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    result = attacked(attack, model, CE, x, y)
    assert result.matching_loss < 1e-20  # the gradient is the one sent,
    assert psnr(result.inputs, x) < 30  # of another picture
    assert not result.converged
    assert "do not determine" in result.details["note"]


def test_a_target_that_is_only_guessed_is_not_proved(digit_pictures):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False))
    x, y = digit_pictures.images[3:4], torch.tensor([[0.3]])
    assert not attacked(RGAP(), model, nn.MSELoss(), x, y).converged
    known = attacked(RGAP(), model, nn.MSELoss(), x, y.double(), labels=True)
    assert known.converged == (psnr(known.inputs, x) > EXACT)


def test_a_scale_with_two_solutions_is_not_proved(digit_pictures):
    """Without biases a brighter and a darker picture have the same gradient under the logistic loss."""
    torch.manual_seed(0)
    model = with_head(mlp(64, 100, 1, bias=False), lambda w: 30 * w)
    x, y = digit_pictures.images[:1], torch.tensor([[0.0]])
    result = attacked(SPEAR(), model, BCE, x, y)
    assert result.converged <= (psnr(result.inputs, x) > EXACT)
    assert not result.converged
    assert "scale" in " ".join(result.details["unproved"])
