"""Batched L-BFGS against minima that are known, and against scipy's."""

import pytest
import torch
from scipy.optimize import minimize
from torch.func import grad_and_value, vmap

from gradguard.attacks._matching.lbfgs import lbfgs

CONDITIONS = (1.0, 1e2, 1e4, 1e6)


def batched(function):
    """`(T, n) -> (T,), (T, n)` from a function of one point; counts its calls in `.calls`."""
    derivative = vmap(grad_and_value(function))

    def value_and_gradient(x):
        value_and_gradient.calls += 1
        gradient, value = derivative(x)
        return value, gradient

    value_and_gradient.calls = 0
    return value_and_gradient


class Quadratics:
    """`(x - c)^T A (x - c) / 2` with the condition numbers of `CONDITIONS`, one trial each."""

    def __init__(self, n=10, conditions=CONDITIONS):
        generator = torch.Generator().manual_seed(0)
        rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        spectra = torch.stack([torch.logspace(0, -torch.tensor(c).log10().item(), n) for c in conditions]).double()
        self.matrices = rotation @ torch.diag_embed(spectra) @ rotation.T
        self.minima = torch.randn(len(conditions), n, generator=generator, dtype=torch.float64)

    def __call__(self, x):
        gradient = torch.einsum("tij,tj->ti", self.matrices, x - self.minima)
        return (gradient * (x - self.minima)).sum(-1) / 2, gradient

    def only(self, trial):
        alone = Quadratics.__new__(Quadratics)
        alone.matrices, alone.minima = self.matrices[[trial]], self.minima[[trial]]
        return alone


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def starts(trials, n, scale=1.0, seed=1):
    return scale * torch.randn(trials, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_quadratics_of_any_conditioning():
    function = Quadratics()
    found = lbfgs(function, torch.zeros(4, 10, dtype=torch.float64), evaluations=400, tolerance=1e-11)
    assert found.converged.all()
    # A gradient of 1e-11 puts the point within its length over the smallest eigenvalue, 1 / condition.
    distance = (found.points - function.minima).norm(dim=-1)
    assert (distance <= 10**0.5 * 1e-11 * torch.tensor(CONDITIONS)).all()
    torch.testing.assert_close(found.values, function(found.points)[0], rtol=0, atol=0)


@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrock(n):
    start = torch.ones(1, n, dtype=torch.float64)
    start[:, ::2] = -1.2
    # In 10 dimensions there is a second, local minimum; from this start the valley leads to the global one.
    found = lbfgs(batched(rosenbrock), start, evaluations=500)
    assert found.converged.all()
    torch.testing.assert_close(found.points, torch.ones_like(start), rtol=0, atol=1e-9)


def test_a_logistic_regression_on_digits_has_scipys_minimum(digit_pictures):
    x, y = digit_pictures.images[:200].flatten(1).double(), digit_pictures.labels[:200]

    def loss(weights):
        weights = weights.reshape(10, 64)
        return torch.nn.functional.cross_entropy(x @ weights.T, y) + 1e-3 * weights.square().sum()

    found = lbfgs(batched(loss), starts(3, 640), evaluations=400, tolerance=1e-8)

    def for_scipy(point):
        gradient, value = grad_and_value(loss)(torch.from_numpy(point))
        return value.item(), gradient.numpy()

    reference = minimize(
        for_scipy, torch.zeros(640).double().numpy(), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-9}
    )
    assert found.converged.all()
    torch.testing.assert_close(found.values, torch.full_like(found.values, reference.fun), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.points, torch.from_numpy(reference.x).expand(3, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("evaluations", [7, 30, 300])
def test_a_batch_does_what_each_trial_does_alone(evaluations):
    function = Quadratics(conditions=(1.0, 1e1, 1e2, 1e3))
    start = starts(4, 10)
    together = lbfgs(function, start, evaluations=evaluations)
    for trial in range(4):
        alone = lbfgs(function.only(trial), start[[trial]], evaluations=evaluations)
        torch.testing.assert_close(together.points[[trial]], alone.points, rtol=1e-7, atol=1e-7)
    assert together.converged.all() == (evaluations == 300)


def test_a_step_to_where_nothing_is_defined_is_too_long():
    """`x - log x` is NaN for negative `x`, where the first steps from near 0 and from far out lead."""
    function = batched(lambda x: (x - torch.log(x)).sum())
    start = torch.tensor([[1e-3, 50.0], [30.0, 30.0]], dtype=torch.float64)
    visited = []

    def recorded(x):
        visited.append(x)
        return function(x)

    found = lbfgs(recorded, start, evaluations=300, tolerance=1e-10)
    assert (torch.stack(visited) < 0).any()  # it did step there
    assert found.converged.all()
    torch.testing.assert_close(found.points, torch.ones_like(start), rtol=0, atol=1e-8)


@pytest.mark.parametrize("hole", [float("-inf"), float("inf"), float("nan")])
def test_a_value_that_is_not_finite_never_wins(hole):
    def function(x):
        value = (x**2).sum(-1)
        return torch.where(x[:, 0] < -0.5, torch.full_like(value, hole), value), 2 * x

    found = lbfgs(function, torch.tensor([[3.0, 0.1]], dtype=torch.float64), evaluations=100)
    assert found.converged.all()
    torch.testing.assert_close(found.points, torch.zeros_like(found.points), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_trial_that_starts_nowhere_leaves_the_others_alone(bad):
    function = Quadratics(conditions=(1.0, 1e1, 1e2, 1e3))
    start = starts(4, 10)
    expected = lbfgs(function, start, evaluations=30)
    broken = start.clone()
    broken[2] = bad
    found = lbfgs(function, broken, evaluations=30)
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found.points[others], expected.points[others], rtol=1e-7, atol=1e-7)
    assert not found.converged[2]
    assert not torch.isfinite(found.values[2])


def test_every_evaluation_is_counted_and_none_is_exceeded():
    for evaluations in (1, 2, 37):
        function = batched(rosenbrock)
        found = lbfgs(function, starts(3, 10, 2.0), evaluations=evaluations)
        assert function.calls == found.evaluations == evaluations
        assert not found.converged.any()
    start = starts(3, 10, 2.0)
    torch.testing.assert_close(lbfgs(batched(rosenbrock), start, evaluations=1).points, start, rtol=0, atol=0)


def test_values_never_rise():
    start = starts(5, 10, 2.0)
    before = batched(rosenbrock)(start)[0]
    for evaluations in range(2, 40, 4):
        value = lbfgs(batched(rosenbrock), start, evaluations=evaluations).values
        assert (value <= before).all()
        before = value


def test_the_start_is_not_changed():
    start = starts(2, 10)
    kept = start.clone()
    lbfgs(batched(rosenbrock), start, evaluations=50)
    assert torch.equal(start, kept)


def test_a_trial_stays_where_it_reached_the_target():
    function, start = Quadratics(), torch.zeros(4, 10, dtype=torch.float64)
    found = lbfgs(function, start, evaluations=2000, target=1e-6, check_every=1)
    assert found.converged.all()
    assert (found.values <= 1e-6).all()
    # The second and third got there before the last one and would be far below had they gone on. (The first,
    # a multiple of the identity, is solved by its first quasi-Newton step.)
    assert (found.values[1:3] > 1e-12).all()
    assert found.evaluations < lbfgs(function, start, evaluations=2000, check_every=1).evaluations


def test_stop_at_first_ends_all_trials():
    function, start = Quadratics(), torch.zeros(4, 10, dtype=torch.float64)
    every = lbfgs(function, start, evaluations=2000, target=1e-10, check_every=5)
    first = lbfgs(function, start, evaluations=2000, target=1e-10, check_every=5, stop_at_first=True)
    assert every.converged.all()
    assert first.converged[0]
    assert first.values[0] <= 1e-10
    assert not first.converged[3]
    assert first.evaluations < every.evaluations


def test_it_ends_by_itself_where_no_step_makes_progress():
    """A kink: no gradient below the tolerance exists, and yet it does not use up its evaluations."""
    found = lbfgs(batched(lambda x: x.abs().sum()), starts(3, 4), evaluations=4000, memory=5)
    assert found.evaluations < 4000
    assert not found.converged.any()
    assert (found.values < 1e-3).all()


def test_curvature_is_used():
    """On condition 100 steepest descent needs hundreds of steps; memory brings it to tens."""
    function, start = Quadratics(n=20, conditions=(1e2,)), torch.zeros(1, 20, dtype=torch.float64)
    assert lbfgs(function, start, evaluations=100).values[0] < 1e-15
