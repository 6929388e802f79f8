"""Where R-GAP starts: the scalar equations against values put into them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard.attacks._closed_form import heads


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- logistic


@pytest.mark.parametrize("mu", [-800.0, -30.0, -1.0, -1e-6, 1e-6, 0.5, 1.2, 1.3, 3.0, 20.0, 600.0])
def test_margins_solve_the_equation_and_hold_the_true_one(mu):
    u = -mu * (math.exp(-mu) / (1 + math.exp(-mu)) if mu > 0 else 1 / (1 + math.exp(mu)))
    found = heads.logistic_margins(u)
    assert len(found) == (1 if mu < 0 else 2)
    assert min(abs(m - mu) for m in found) <= 1e-9 * max(1, abs(mu))
    for m in found:
        assert -m / (1 + math.exp(m)) == pytest.approx(u, rel=1e-10, abs=1e-300)


def test_at_and_below_the_minimum_there_is_one_margin():
    assert pytest.approx(1.2784645, abs=1e-7) == heads.MU_MINIMUM
    assert heads.logistic_margins(heads.U_MINIMUM) == (heads.MU_MINIMUM,)
    assert heads.logistic_margins(-1.0) == (heads.MU_MINIMUM,)
    assert heads.logistic_margins(0.0) == (0.0,)


@pytest.mark.parametrize("offset", [-1e-5, 1e-5])
def test_near_the_minimum_no_more_than_half_the_digits_are_lost(offset):
    mu = heads.MU_MINIMUM + offset
    found = heads.logistic_margins(-mu / (1 + math.exp(mu)))
    assert min(abs(m - mu) for m in found) < 1e-10


def like():
    return torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.BCEWithLogitsLoss(), [(1.0, 1.0), (0.0, -1.0)]),
        (nn.BCEWithLogitsLoss(reduction="sum"), [(1.0, 1.0), (0.0, -1.0)]),
        (nn.SoftMarginLoss(), [(1.0, 1.0), (-1.0, -1.0)]),
        (lambda z, y: torch.log(1 + torch.exp(-y * z)).mean(), [(1.0, 1.0), (-1.0, -1.0)]),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), [(0.0, -1.0)]),
        (nn.MSELoss(), []),
        (nn.CrossEntropyLoss(), []),
    ],
    ids=["BCE", "BCE sum", "SoftMargin", "the paper's", "weighted", "MSE", "cross-entropy"],
)
def test_the_logistic_loss_is_told_by_its_slope(loss, expected):
    assert [(float(t), s) for t, s in heads.logistic_targets(loss, None, like())] == expected


def test_a_given_label_is_the_only_one_tried():
    label = torch.tensor([[0.0]], dtype=torch.float64)
    assert heads.logistic_targets(nn.BCEWithLogitsLoss(), label, like()) == [(label, -1.0)]
    assert heads.logistic_targets(nn.SoftMarginLoss(), label, like()) == []


# ---------------------------------------------------------------------- softmax


@pytest.mark.parametrize("outputs", [2, 3, 10, 100])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("known", [True, False], ids=["label known", "label unknown"])
def test_softmax_heads_hold_the_true_one(outputs, scale, known):
    weight, x, y = random(outputs, 20), random(20, seed=1), torch.tensor([1])
    weight = weight * scale / weight.norm(dim=1, keepdim=True)
    k = torch.softmax(weight @ x, -1) - F.one_hot(y, outputs)[0]
    found = heads.softmax_heads(weight, torch.outer(k, x), y if known else None)
    best = min(found, key=lambda head: float((head.x - x).norm()))
    assert torch.allclose(best.x, x, rtol=1e-6, atol=1e-8)
    assert torch.allclose(best.k, k, rtol=1e-6, atol=1e-10)
    assert int(best.targets) == 1
    if outputs > 2:
        assert {int(h.targets) for h in found} == {1}  # the largest entry of k is the label's


def test_two_classes_have_two_heads_and_each_explains_the_gradient():
    """The equation is then the logistic one: an example that is classified rightly has a twin."""
    weight, x = 0.3 * random(2, 20), random(20, seed=1)
    y = (weight @ x).argmax()
    k = torch.softmax(weight @ x, -1) - F.one_hot(y, 2)
    found = heads.softmax_heads(weight, torch.outer(k, x), y[None])
    assert len(found) == 2
    for head in found:
        assert torch.allclose(torch.outer(head.k, head.x), torch.outer(k, x), atol=1e-10)
        assert torch.allclose(head.k, torch.softmax(weight @ head.x, -1) - F.one_hot(y, 2), atol=1e-8)


def test_rank_one_is_the_leading_singular_pair():
    matrix = torch.outer(random(6), random(9, seed=1)) + 1e-3 * random(6, 9, seed=2)
    left, values, right = torch.linalg.svd(matrix)
    a, b = heads.rank_one(matrix)
    assert torch.allclose(torch.outer(a, b), values[0] * torch.outer(left[:, 0], right[0]), atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.CrossEntropyLoss(), True),
        (nn.CrossEntropyLoss(reduction="sum"), True),
        (lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), False),
        (nn.MultiMarginLoss(), False),
        (nn.BCEWithLogitsLoss(), False),
    ],
    ids=["cross-entropy", "sum", "log-softmax and NLL", "smoothed", "margin", "BCE"],
)
def test_cross_entropy_is_told_by_its_slope(loss, expected):
    assert heads.is_softmax_cross_entropy(loss, 4, torch.tensor([2])) is expected


# ---------------------------------------------------------------------- squared error


@pytest.mark.parametrize("outputs", [1, 2, 10])
@pytest.mark.parametrize(("reduction", "share"), [("mean", True), ("sum", False)])
@pytest.mark.parametrize("known", [True, False], ids=["target known", "target unknown"])
def test_squared_error_heads_hold_the_true_one(outputs, reduction, share, known):
    weight, x = random(outputs, 20), random(20, seed=1)
    y = torch.eye(outputs, dtype=torch.float64)[[outputs - 1]]
    s = 2 / outputs if share else 2.0
    k = s * (weight @ x - y[0])
    targets = heads.squared_error_targets(nn.MSELoss(reduction=reduction), outputs, y if known else None, weight)
    assert any(torch.equal(t, y) and scale == pytest.approx(s) for t, scale in targets)
    found = heads.squared_error_heads(weight, torch.outer(k, x), targets)
    best = min(found, key=lambda head: float((head.x - x).norm()))
    assert torch.allclose(best.x, x, rtol=1e-9)
    assert torch.allclose(best.k, k, rtol=1e-9)
    assert torch.equal(best.targets, y)
    if outputs > 2:
        assert len(found) == 1  # across `k` the equations hold for one target and one scale


def test_a_target_that_is_no_class_must_be_given():
    weight, x, y = random(3, 20), random(20, seed=1), random(1, 3, seed=2)
    gradient = torch.outer(weight @ x - y[0], x)
    loss = nn.MSELoss()
    known = heads.squared_error_heads(weight, 2 / 3 * gradient, heads.squared_error_targets(loss, 3, y, weight))
    assert min(float((head.x - x).norm()) for head in known) < 1e-9
    guessed = heads.squared_error_heads(weight, 2 / 3 * gradient, heads.squared_error_targets(loss, 3, None, weight))
    assert min(float((head.x - x).norm()) for head in guessed) > 1e-3


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.SmoothL1Loss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()])
def test_squared_error_is_told_by_its_slope(loss):
    assert heads.squared_error_targets(loss, 3, None, like()) == []
    assert heads.squared_error_targets(nn.MSELoss(), 3, torch.tensor([1]), like()) == []


def test_targets_follow_from_the_derivative():
    ce, bce, margin = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.SoftMarginLoss()
    assert heads.recover_targets(ce, torch.tensor([0.1, 0.2, -0.3]).double()).tolist() == [2]
    assert heads.recover_targets(bce, torch.tensor([-0.4]).double()).tolist() == [[1.0]]
    assert heads.recover_targets(bce, torch.tensor([0.4]).double()).tolist() == [[0.0]]
    assert heads.recover_targets(margin, torch.tensor([0.4]).double()).tolist() == [[-1.0]]
    assert heads.recover_targets(nn.MSELoss(), torch.tensor([0.4, 0.1]).double()) is None
