"""Matching what was sent: some of the parameters only, or all of them times an unknown factor."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import DLG, IDLG, ILRG, RGAP, SPEAR, InvertingGradients, LevenbergMarquardt, Observation
from gradguard.attacks._matching.distances import CosineDistance, MahalanobisDistance, SquaredDistance
from gradguard.attacks._matching.levenberg_marquardt import levenberg_marquardt
from gradguard.attacks._matching.trials import Trials
from references import flat_gradient, loss_of, psnr


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def seen(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    return Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), labels=y, num_classes=10)


def without(observation, *names):
    return replace(observation, sent={n: g for n, g in observation.sent.items() if n not in names})


def times(observation, factor, *, known=False):
    sent = {n: factor * g for n, g in observation.sent.items()}
    return replace(observation, sent=sent, scale=factor if known else None)


DISTANCES = (
    SquaredDistance(),
    SquaredDistance(weights={"0.weight": 0.2, "5.bias": 3.0}),
    CosineDistance(),
    MahalanobisDistance(variance=0.3),
)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("free", [False, True])
def test_the_objective_and_its_derivative_against_double_backward(seen, convnet, cross_entropy, distance, free):
    """Of what was sent alone, with the best factor found by a closed form in plain tensors."""
    names = ["0.weight", "2.bias", "5.bias"]
    part = without(times(seen, -3.0) if free else seen, *(n for n in seen.sent if n not in names))
    x = torch.rand(1, 1, 8, 8, generator=gen(), dtype=torch.float64, requires_grad=True)
    loss, parameters = loss_of(convnet, cross_entropy, x, seen.labels)
    all_names = [n for n, _ in convnet.named_parameters()]
    own = dict(zip(all_names, torch.autograd.grad(loss, parameters, create_graph=True), strict=True))
    weights = dict.fromkeys(names, 1.0)
    if isinstance(distance, SquaredDistance) and distance.weights:
        weights |= {n: w for n, w in distance.weights.items() if n in names}

    def inner(a, b):
        return sum(weights[n] * (a[n] * b[n]).sum() for n in names)

    sent = part.sent
    c = (inner(own, sent) / inner(own, own)).detach() if free else 1.0
    gap = {n: c * own[n] - sent[n] for n in names}
    if isinstance(distance, CosineDistance):
        cosine = inner(own, sent) / (inner(own, own) * inner(sent, sent)).sqrt()
        expected = 1 - (cosine.abs() if free else cosine)
    elif isinstance(distance, MahalanobisDistance):
        expected = inner(gap, gap) / 0.3 / sum(own[n].numel() for n in names)
    else:
        expected = inner(gap, gap) / inner(sent, sent)
    trials = Trials([part], labels=seen.labels[None], distance=distance)
    value, slope = trials.value_and_gradient(x.detach().reshape(1, -1), torch.tensor([0]))
    torch.testing.assert_close(value[0], expected.detach())
    torch.testing.assert_close(slope[0], torch.autograd.grad(expected, x)[0].flatten())


QUICK = DLG(restarts=1, evaluations=120, polish=12)


@pytest.mark.parametrize("factor", [0.5, 32.0, -0.1])
def test_dlg_recovers_as_well_without_knowing_the_factor(seen, batch, factor):
    known = QUICK(times(seen, factor, known=True), generator=gen())
    found = QUICK(times(seen, factor), generator=gen())
    assert psnr(known.inputs, batch[0][:1]) > 100
    assert psnr(found.inputs, batch[0][:1]) > 100
    assert found.details["scale"] == pytest.approx(factor, rel=1e-6)
    assert known.details["scale"] == factor
    assert found.matching_loss < 1e-12
    assert found.converged


def test_dlg_without_label_or_factor(seen, batch):
    found = DLG(restarts=2, evaluations=200, polish=12)(replace(times(seen, 0.5), labels=None), generator=gen(1))
    assert torch.equal(found.labels, seen.labels)
    assert psnr(found.inputs, batch[0][:1]) > 60
    assert found.details["scale"] == pytest.approx(0.5, rel=1e-3)


def test_the_polish_ends_where_the_picture_is_whatever_the_factor(seen, batch):
    x = batch[0][:1]
    start = x[None] + 0.02 * torch.randn(1, 1, 1, 8, 8, generator=gen(), dtype=torch.float64)
    found = levenberg_marquardt(times(seen, -7.0), start, seen.labels[None], iterations=30)
    torch.testing.assert_close(found.points.reshape(x.shape), x, rtol=0, atol=1e-9)


def test_the_polish_by_lsmr_steps_as_the_dense_one(seen, batch, monkeypatch):
    start = batch[0][:1][None] + 0.05
    dense = levenberg_marquardt(times(seen, 4.0), start, seen.labels[None], iterations=3)
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.DENSE_SIZE", 0)
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.FORCING", 1e-9)
    krylov = levenberg_marquardt(times(seen, 4.0), start, seen.labels[None], iterations=3, inner_iterations=2000)
    torch.testing.assert_close(dense.values, krylov.values, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("missing", [["0.weight"], ["0.weight", "0.bias", "5.weight", "5.bias"], ["2.weight"]])
def test_dlg_with_parameters_that_were_not_sent(seen, batch, missing):
    found = QUICK(without(seen, *missing), generator=gen())
    assert psnr(found.inputs, batch[0][:1]) > 60
    assert found.matching_loss < 1e-12
    assert found.details["scale"] == 1.0


def test_what_was_not_sent_has_no_influence(seen):
    """The last layer alone: a loss below what any wrong picture's whole gradient has, and no picture."""
    head = without(seen, "0.weight", "0.bias", "2.weight", "2.bias")
    point = torch.rand(1, 64, generator=gen(), dtype=torch.float64)
    value, _ = Trials([head], labels=seen.labels[None]).value_and_gradient(point, torch.tensor([0]))
    whole = flat_gradient(seen.loss_gradient.model, seen.loss_gradient.loss_fn, point.reshape(1, 1, 8, 8), seen.labels)
    own, sent = whole[-5130:], torch.cat([g.flatten() for g in head.sent.values()])
    torch.testing.assert_close(value[0], (own - sent).square().sum() / sent.square().sum())


@pytest.mark.parametrize(
    "attack",
    [IDLG(restarts=1, evaluations=5), InvertingGradients(iterations=5), LevenbergMarquardt(restarts=1, iterations=2)],
)
def test_every_matching_attack_takes_partial_gradients_and_free_factors(seen, attack):
    found = attack(without(times(seen, 0.5), "2.weight"), generator=gen())
    assert found.inputs.shape == (1, 1, 8, 8)
    assert found.matching_loss < 1


@pytest.mark.parametrize("attack", [RGAP(), SPEAR()])
def test_closed_forms_refuse_by_name(seen, attack):
    with pytest.raises(
        InputError, match=r"needs the gradient of every parameter, and that of '2\.weight' was not sent"
    ):
        attack(without(seen, "2.weight"))
    with pytest.raises(InputError, match="needs the factor of the sent gradient"):
        attack(times(seen, 0.5))


def test_attacks_on_labels_need_the_head(seen):
    for attack in (ILRG(), IDLG()):
        with pytest.raises(InputError, match=r"'5\.weight'.*was not sent"):
            attack(without(replace(seen, labels=None), "5.weight"))


def test_a_zero_gradient_says_nothing(seen):
    with pytest.raises(InputError, match="zero everywhere"):
        DLG()(replace(seen, sent={n: torch.zeros_like(g) for n, g in seen.sent.items()}))


def test_pictures_that_are_attacked_together_have_sent_the_same(seen):
    with pytest.raises(InputError, match="not_sent"):
        DLG().attack_all([seen, without(seen, "2.weight")])
    with pytest.raises(InputError, match="Give the factors"):
        DLG().attack_all([seen, times(seen, 2.0)])


def test_weights_of_what_was_not_sent_are_refused(seen):
    with pytest.raises(InputError, match="no parameters whose gradient was sent"):
        Trials([without(seen, "2.weight")], distance=SquaredDistance(weights={"2.weight": 2.0}))


def test_a_free_factor_over_local_steps(convnet, cross_entropy, batch):
    from gradguard.functional.local_training import LocalTraining

    local = LocalTraining(steps=2, learning_rate=0.05)
    function = LossGradient(convnet, cross_entropy)
    x, y = batch[0][:1], batch[1][:1]
    sent = {n: -0.1 * g for n, g in local.mean_gradient(function, x, y).items()}
    observation = Observation(
        loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, local=local, scale=None
    )
    loss, scale = observation.match(x, y)
    assert loss < 1e-20
    assert scale == pytest.approx(-0.1)
    found = DLG(restarts=1, evaluations=150, polish=0)(observation, generator=gen())
    assert psnr(found.inputs, x) > 40


def test_a_batch_mean_loss_scaled_in_a_half_sum(cross_entropy, batch, convnet):
    """A client that sums where the server thinks it averages: a factor of the batch's size."""
    x, y = batch[0][:2], batch[1][:2]
    sent = LossGradient(convnet, nn.CrossEntropyLoss(reduction="sum"))(x, y)
    observation = Observation(
        loss_gradient=LossGradient(convnet, cross_entropy),
        sent=sent,
        input_shape=(1, 8, 8),
        batch_size=2,
        labels=y,
        scale=None,
    )
    assert observation.match(x, y)[1] == pytest.approx(2.0)
