"""Levenberg-Marquardt on the matching residual of real digits, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard import InputJacobian, LossGradient
from gradguard.attacks import Observation
from gradguard.attacks._matching.levenberg_marquardt import levenberg_marquardt
from gradguard.functional.vectors import add, flatten, norm
from gradguard.leakage import influence
from references import dense_jacobian, flat_gradient


def observe(model, loss_fn, x, y):
    function = LossGradient(model, loss_fn)
    return Observation(
        loss_gradient=function, sent=function(x, y), input_shape=tuple(x.shape[1:]), batch_size=len(x), labels=y
    )


def noise(gradient, ratio, seed=3):
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in gradient.items()}
    scale = ratio * norm(gradient) / norm(drawn)
    return {n: scale * d for n, d in drawn.items()}


def around(x, trials=3, distance=0.1):
    generator = torch.Generator().manual_seed(0)
    return x + distance * torch.randn(trials, *x.shape, generator=generator, dtype=x.dtype)


@pytest.fixture
def digit(batch):
    return batch[0][:1], batch[1][:1]


@pytest.fixture
def observation(convnet, cross_entropy, digit):
    return observe(convnet, cross_entropy, *digit)


@pytest.fixture(params=["dense", "lsmr"])
def path(request, monkeypatch):
    """Both ways to take a step: the normal one for small inputs, and the one for large ones."""
    if request.param == "lsmr":
        monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.DENSE_SIZE", 0)
    return request.param


def test_it_ends_at_the_arithmetics_precision(observation, digit, path):
    x, y = digit
    found = levenberg_marquardt(observation, around(x), y.expand(3, 1))
    assert found.converged.all()
    assert (found.values < 1e-29).all()
    torch.testing.assert_close(found.points, x.flatten(1).expand(3, -1), rtol=0, atol=1e-13)
    assert found.evaluations < 15


def test_convergence_is_superlinear(observation, digit):
    """Each step takes a smaller share of the error with it: the damping goes to 0 with the residual."""
    x, y = digit
    errors = [around(x).sub(x).flatten(1).norm(dim=-1)]
    for iterations in range(1, 5):
        found = levenberg_marquardt(observation, around(x), y.expand(3, 1), iterations=iterations)
        errors.append((found.points - x.flatten()).norm(dim=-1))
    shares = torch.stack(errors)[1:] / torch.stack(errors)[:-1]
    assert (shares[1:] < shares[:-1]).all()
    assert (shares[-1] < 1e-3).all()
    assert (found.values < 1e-25).all()


@pytest.mark.parametrize("iterations", [1, 3])
def test_dense_and_lsmr_take_the_same_steps(observation, digit, monkeypatch, iterations):
    x, y = digit
    start, labels = around(x, distance=0.3), y.expand(3, 1)
    dense = levenberg_marquardt(observation, start, labels, iterations=iterations)
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.DENSE_SIZE", 0)
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.FORCING", 0.0)

    def refuse(*args, **kwargs):
        raise AssertionError("the dense path was taken")

    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.dense_least_squares", refuse)
    krylov = levenberg_marquardt(observation, start, labels, iterations=iterations)
    torch.testing.assert_close(krylov.points, dense.points, rtol=0, atol=1e-6)


def test_one_step_is_the_damped_normal_equations(convnet, cross_entropy, observation, digit, path, monkeypatch):
    """`(J J^T / |sent|^2 + mu) s = -J r / |sent|` with the first damping, by a dense solve."""
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.FORCING", 0.0)
    x, y = digit
    start = around(x, trials=1)
    found = levenberg_marquardt(observation, start, y[None], iterations=1)
    sent = flatten(observation.sent)
    jacobian = dense_jacobian(convnet, cross_entropy, start[0], y) / sent.norm()
    residual = (flat_gradient(convnet, cross_entropy, start[0], y) - sent) / sent.norm()
    # The damping is what the step leaves over: mu s = -(J J^T s + J r), for one number mu.
    step = found.points[0] - start.flatten()
    left = -(jacobian @ (jacobian.T @ step + residual))
    mu = (left @ step) / (step @ step)
    gram = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    assert 1e-4 * gram[0] < mu < 1e-2 * gram[-1]
    torch.testing.assert_close(left, mu * step, rtol=0, atol=1e-6 * float(mu * step.norm()))


def test_trials_are_independent(observation, digit, path):
    x, y = digit
    start = around(x, distance=1.0)
    together = levenberg_marquardt(observation, start, y.expand(3, 1), iterations=2)
    for trial in range(3):
        alone = levenberg_marquardt(observation, start[[trial]], y.expand(1, 1), iterations=2)
        torch.testing.assert_close(together.points[[trial]], alone.points, rtol=0, atol=1e-6)


def test_a_trial_that_is_not_a_number_leaves_the_others_alone(observation, digit, path):
    x, y = digit
    start = around(x)
    start[1] = float("nan")
    found = levenberg_marquardt(observation, start, y.expand(3, 1), iterations=8)
    assert (found.values[[0, 2]] < 1e-25).all()
    assert not torch.isfinite(found.values[1])


def test_values_never_rise(observation, digit):
    x, y = digit
    start, before = around(x, distance=3.0), torch.full((3,), float("inf"), dtype=torch.float64)
    for iterations in (1, 2, 4, 8):
        value = levenberg_marquardt(observation, start, y.expand(3, 1), iterations=iterations).values
        assert (value <= before).all()
        before = value


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_a_noisy_gradient_leads_to_the_least_squares_point(convnet, cross_entropy, observation, digit, path, ratio):
    x, y = digit
    delta = noise(observation.sent, ratio)
    noisy = replace(observation, sent=add(observation.sent, delta))
    found = levenberg_marquardt(noisy, around(x), y.expand(3, 1))
    assert found.converged.all()
    for point in found.points.reshape(3, *x.shape):
        residual = flat_gradient(convnet, cross_entropy, point, y) - flatten(noisy.sent)
        jacobian = dense_jacobian(convnet, cross_entropy, point, y)
        assert residual.norm() > 0.5 * ratio * norm(observation.sent)  # there is no point without a residual
        # A step ends it that gains less than 1e-10 of the value, the square of this.
        assert (jacobian @ residual).norm() < 1e-5 * jacobian.norm() * residual.norm()


def test_steps_are_solved_as_far_as_they_are_worth(observation, digit, monkeypatch):
    """Far from the picture less far, and fewer products in all for the same end."""
    x, y = digit
    spent = []
    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.DENSE_SIZE", 0)
    solve = levenberg_marquardt.__globals__["lsmr"]

    def counted(*args, **kwargs):
        solution = solve(*args, **kwargs)
        spent.append(solution.iterations)
        return solution

    monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.lsmr", counted)
    for forcing in (0.0, 0.1):
        monkeypatch.setattr("gradguard.attacks._matching.levenberg_marquardt.FORCING", forcing)
        found = levenberg_marquardt(observation, around(x, trials=1), y[None])
        assert found.values.max() < 1e-29
        if not forcing:
            exact, spent = sum(spent), []
    assert spent[0] < max(spent)
    assert sum(spent) < exact


def test_the_least_squares_point_is_where_i2f_says(observation, digit):
    """I2F is this attack's error to first order: 0.1% off at 1% of noise."""
    x, y = digit
    delta = noise(observation.sent, 0.01)
    found = levenberg_marquardt(replace(observation, sent=add(observation.sent, delta)), around(x), y.expand(3, 1))
    expected = influence(InputJacobian(observation.loss_gradient, x, y), delta).displacement.flatten()
    for point in found.points:
        assert (point - x.flatten() - expected).norm() < 2e-3 * expected.norm()


def test_batches_are_solved_jointly(convnet, cross_entropy, batch):
    x, y = batch[0][:2], batch[1][:2]
    found = levenberg_marquardt(observe(convnet, cross_entropy, x, y), around(x), y.expand(3, 2))
    assert (found.values < 1e-28).all()
    torch.testing.assert_close(found.points, x.flatten().expand(3, -1), rtol=0, atol=1e-11)


def test_a_network_that_does_not_see_the_mean(cross_entropy, digit):
    """It normalises its input, so J has a null space that holds the constant picture; the matching still ends at 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10)
    ).double()
    x, y = digit
    start = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = levenberg_marquardt(observe(model, cross_entropy, x, y), start, y.expand(4, 1))
    assert (found.values < 1e-25).all()
    shown = nn.functional.layer_norm(found.points, (64,))
    torch.testing.assert_close(shown, nn.functional.layer_norm(x.flatten(1), (64,)).expand(4, -1), rtol=0, atol=1e-9)


def test_the_start_is_not_changed(observation, digit):
    x, y = digit
    start = around(x)
    kept = start.clone()
    levenberg_marquardt(observation, start, y.expand(3, 1), iterations=2)
    assert torch.equal(start, kept)
