"""The matching engine: its objectives by a second implementation, and how it chooses."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import DLG, InvertingGradients, Observation
from gradguard.attacks._matching.distances import CosineDistance, SquaredDistance
from gradguard.attacks._matching.penalties import total_variation
from gradguard.functional.vectors import flatten
from references import loss_of, psnr


def observe(model, loss_fn, x, y, **given):
    function = LossGradient(model, loss_fn)
    given = {"labels": y, "num_classes": 10} | given
    return Observation(
        loss_gradient=function, sent=function(x, y), input_shape=tuple(x.shape[1:]), batch_size=len(x), **given
    )


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair(batch):
    return batch[0][:2], batch[1][:2]


@pytest.fixture
def observation(convnet, cross_entropy, pair):
    return observe(convnet, cross_entropy, *pair)


def by_double_backward(model, loss_fn, inputs, labels, sent, distance):
    """A matching objective and its derivative by plain autograd, through the gradient's graph."""
    inputs = inputs.clone().requires_grad_(True)
    loss, parameters = loss_of(model, loss_fn, inputs, labels)
    own = torch.autograd.grad(loss, parameters, create_graph=True)
    value = distance(torch.cat([g.flatten() for g in own]), sent, inputs)
    (gradient,) = torch.autograd.grad(value, inputs)
    return value.detach(), gradient


def plain_squared(own, sent, inputs):
    return (own - sent).norm() ** 2 / sent.norm() ** 2


def plain_cosine_and_tv(own, sent, inputs):
    down = [abs(p[0, i + 1, j] - p[0, i, j]) for p in inputs for i in range(7) for j in range(8)]
    right = [abs(p[0, i, j + 1] - p[0, i, j]) for p in inputs for i in range(8) for j in range(7)]
    variation = sum(down) / len(down) + sum(right) / len(right)
    return 1 - F.cosine_similarity(own, sent, dim=0) + 0.3 * variation


@pytest.mark.parametrize(
    ("attack", "distance"),
    [(DLG(), plain_squared), (InvertingGradients(total_variation=0.3), plain_cosine_and_tv)],
    ids=["squared", "cosine and TV"],
)
def test_objectives_and_their_derivatives(convnet, cross_entropy, observation, pair, attack, distance):
    trials = torch.rand(3, 2, 1, 8, 8, generator=gen(), dtype=torch.float64)
    problem = replace(attack, restarts=3).trials([observation])
    values, gradients = problem.value_and_gradient(trials.flatten(1), torch.arange(3))
    assert values.shape == (3,)
    for trial in range(3):
        value, gradient = by_double_backward(
            convnet, cross_entropy, trials[trial], pair[1], flatten(observation.sent), distance
        )
        torch.testing.assert_close(values[trial], value, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradients[trial], gradient.flatten(), rtol=1e-8, atol=1e-12)


def test_distances_are_zero_at_the_truth_and_scale_free(observation, pair):
    sent = {n: g[None] for n, g in observation.sent.items()}
    squared, cosine = SquaredDistance(), CosineDistance()

    def times(factor):
        return {n: factor * g for n, g in sent.items()}

    assert squared(sent, sent) == 0
    assert abs(cosine(sent, sent)) < 1e-15
    torch.testing.assert_close(squared(times(3), sent), torch.tensor([4.0]).double())
    assert abs(cosine(times(3), sent)) < 1e-15
    torch.testing.assert_close(cosine(times(-1), sent), torch.tensor([2.0]).double())
    assert torch.isfinite(cosine(times(0), sent))
    problem = DLG(restarts=1).trials([observation])
    assert (problem.matching_losses(pair[0][None], pair[1][None], torch.arange(1)) < 1e-30).all()


def test_total_variation_by_hand():
    picture = torch.tensor([[[[[0.0, 1.0], [3.0, 1.0]]]]])
    assert total_variation(picture) == (3 + 0) / 2 + (1 + 2) / 2
    assert total_variation(torch.rand(1, 2, 5)) == 0  # no pictures: nothing is said about neighbours


def test_matching_losses_are_the_plain_ones(convnet, cross_entropy, observation, pair):
    trials = torch.rand(3, 2, 1, 8, 8, generator=gen(), dtype=torch.float64)
    losses = DLG(restarts=3).trials([observation]).matching_losses(trials, pair[1].expand(3, 2), torch.arange(3))
    for trial in range(3):
        value, _ = by_double_backward(
            convnet, cross_entropy, trials[trial], pair[1], flatten(observation.sent), plain_squared
        )
        torch.testing.assert_close(losses[trial], value, rtol=1e-10, atol=0)
        assert observation.matching_loss(trials[trial], pair[1]) == pytest.approx(value.item(), rel=1e-10)


@pytest.mark.parametrize(
    "attack", [DLG(restarts=6, evaluations=6, polish=0), InvertingGradients(restarts=6, iterations=3)]
)
def test_the_trial_of_the_lowest_matching_loss_is_kept(convnet, cross_entropy, observation, pair, attack):
    """Cut short, so that the trials differ."""
    found = attack(observation, generator=gen())
    losses = found.details["trial_losses"]
    assert len(set(losses)) == len(losses) == 6
    assert losses[found.details["trial"]] == min(losses)
    value, _ = by_double_backward(
        convnet, cross_entropy, found.inputs.double(), pair[1], flatten(observation.sent), plain_squared
    )
    assert found.matching_loss == pytest.approx(value.item(), rel=1e-9)
    assert min(losses) == pytest.approx(value.item(), rel=1e-4)  # a float32 attack's own
    assert not found.converged


@pytest.mark.parametrize(
    "attack", [DLG(restarts=2, evaluations=5, polish=1), InvertingGradients(restarts=2, iterations=5)]
)
def test_the_same_generator_gives_the_same_result(observation, attack):
    state = torch.get_rng_state()
    first, again, other = (attack(observation, generator=gen(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert first.matching_loss == again.matching_loss
    assert not torch.equal(first.inputs, other.inputs)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global one


def test_an_observation_has_no_place_for_the_truth():
    assert {f.name for f in fields(Observation)} == {
        "loss_gradient",
        "sent",
        "input_shape",
        "batch_size",
        "labels",
        "num_classes",
        "value_range",
        "local",
        "scale",
        "knowledge",
        "offset",
    }


def test_an_attack_follows_the_gradient_alone(convnet, cross_entropy, batch):
    """Two observations that differ in nothing but the gradient lead to the two pictures behind them."""
    label = torch.tensor([3])
    for x in (batch[0][:1], batch[0][2:3]):
        found = DLG(restarts=2)(observe(convnet, cross_entropy, x, label), generator=gen())
        assert psnr(found.inputs, x) > 100


def test_polish_never_makes_a_trial_worse(observation):
    rough = DLG(restarts=4, evaluations=8, polish=0)(observation, generator=gen())
    polished = DLG(restarts=4, evaluations=8, polish=3)(observation, generator=gen())
    before, after = rough.details["trial_losses"], polished.details["trial_losses"]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert min(after) < 0.1 * min(before)
    assert polished.details["polish_iterations"] <= 6  # three for the best trial, three for the others


@dataclass(frozen=True, kw_only=True)
class FirstTrialIsBroken(DLG):
    """Its first trial starts where nothing is defined."""

    def start(self, shape, observation, generator):
        start = super().start(shape, observation, generator)
        start[0] = float("nan")
        return start


@dataclass(frozen=True, kw_only=True)
class FromNearby(DLG):
    """Starts a little beside a picture."""

    near: torch.Tensor

    def start(self, shape, observation, generator):
        return (self.near + 1e-6).expand(shape).clone()


def test_the_best_trial_is_polished_however_well_it_matches(observation, pair):
    """A perturbation much smaller than the gradient moves the picture all the same."""
    attack = FromNearby(near=pair[0], restarts=2, evaluations=1)
    rough = replace(attack, polish=0)(observation, generator=gen())
    assert rough.matching_loss < 1e-10
    assert attack(observation, generator=gen()).matching_loss < 1e-10 * rough.matching_loss


def test_a_trial_that_is_not_a_number_never_wins(observation, pair):
    found = FirstTrialIsBroken(restarts=2)(observation, generator=gen())
    assert found.details["trial"] == 1
    assert found.details["trial_losses"][0] == float("inf")
    assert found.converged
    assert psnr(found.inputs, pair[0]) > 100


def test_nothing_but_broken_trials_is_no_match(observation):
    found = FirstTrialIsBroken(restarts=1, polish=2)(observation, generator=gen())
    assert not found.converged


def test_more_restarts_start_with_the_same_trials(observation):
    """Trials advance together but each on its own: the first two of four are the two of two."""
    few = DLG(restarts=2, evaluations=10, polish=0)(observation, generator=gen()).details["trial_losses"]
    many = DLG(restarts=4, evaluations=10, polish=0)(observation, generator=gen()).details["trial_losses"]
    assert many[:2] == pytest.approx(few, rel=1e-6)


def test_reconstructions_keep_pictures_out_of_their_repr(observation):
    found = DLG(restarts=1, evaluations=3, polish=0)(observation, generator=gen())
    assert "tensor" not in repr(found)
    assert "DLG" in repr(found)
    assert found.seconds > 0


def test_inputs_that_are_no_pictures(cross_entropy, digit_pictures):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    x, y = digit_pictures.images[:1].double().flatten(1), digit_pictures.labels[:1]
    found = DLG(restarts=1)(observe(model, cross_entropy, x, y), generator=gen())
    assert found.inputs.shape == (1, 64)
    assert psnr(found.inputs, x) > 100


def test_observations_are_checked(observation, pair):
    with pytest.raises(InputError, match="`labels` must have one entry per example: 2 examples, 3 labels"):
        replace(observation, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        replace(observation, batch_size=0)
    broken = {n: g.clone() for n, g in observation.sent.items()}
    broken["5.bias"][0] = float("nan")
    with pytest.raises(InputError, match=r"'5\.bias' holds NaN"):
        replace(observation, sent=broken)
