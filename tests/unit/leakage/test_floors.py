import math
from dataclasses import dataclass

import pytest
import torch

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.functional.vectors import flatten
from gradguard.leakage import bayes_floor, cramer_rao_floor, spectrum
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.zoo.models import digits_convnet, fcn, lenet, uniform_init_
from references import dense_jacobian

PRIOR = PowerLawPrior()
MODELS = {
    "fcn": lambda: fcn((64, 48, 10), activation="tanh", bias=True),
    "lenet-sigmoid-uniform": lambda: uniform_init_(lenet(image_size=8)),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@dataclass
class Case:
    """Two digits, the operator, its dense matrices by double backward, and the prior's matrix."""

    jacobian: InputJacobian
    dense: torch.Tensor
    c: torch.Tensor


@pytest.fixture(params=MODELS)
def case(request, cross_entropy, batch):
    return make_case(request.param, cross_entropy, batch)


@pytest.fixture
def quick(cross_entropy, batch):
    """For what needs thousands of products."""
    return make_case("fcn", cross_entropy, batch)


def make_case(name, cross_entropy, batch):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    inputs, targets = batch[0][:2], batch[1][:2]
    jacobian = InputJacobian(LossGradient(model, cross_entropy), inputs, targets)
    dense = [dense_jacobian(model, cross_entropy, inputs[r : r + 1], targets[r : r + 1]) / 2 for r in range(2)]
    c = PRIOR.apply(torch.eye(64).double().reshape(64, 1, 8, 8)).reshape(64, 64)
    return Case(jacobian, torch.stack(dense), c)


def variances(jacobian, kind):
    """A number, one number per parameter, or one per element."""
    if kind == "number":
        return 1e-6
    if kind == "per parameter":
        return {n: 10.0 ** -(5 + i) for i, n in enumerate(jacobian.parameters)}
    generator = seeded(5)
    return {
        n: 1e-6 * torch.rand(p.shape, generator=generator, dtype=p.dtype).add(0.1)
        for n, p in jacobian.parameters.items()
    }


def flat_variance(jacobian, variance):
    if isinstance(variance, float):
        variance = dict.fromkeys(jacobian.parameters, variance)
    return flatten({n: torch.as_tensor(variance[n]).expand(p.shape) for n, p in jacobian.parameters.items()})


def posterior_mse(c, k):
    """`tr(C - C (C + K)^{-1} C) / D`, by the formula as it stands."""
    return torch.stack([(c - c @ torch.linalg.solve(c + one, c)).trace() for one in k]) / len(c)


KINDS = ["number", "per parameter", "per element"]


# ---------------------------------------------------------------------- Cramer-Rao


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dense", "gram"])
def test_cramer_rao_is_the_trace_of_the_inverse_information(case, kind, method):
    variance = variances(case.jacobian, kind)
    information = (case.dense / flat_variance(case.jacobian, variance)) @ case.dense.mT
    expected = torch.stack([torch.linalg.inv(one).trace() for one in information]) / 64
    found = cramer_rao_floor(case.jacobian, variance, method=method)
    torch.testing.assert_close(found.mse, expected, rtol=1e-5, atol=0)
    assert found.method == method
    assert (found.undetermined == 0).all()
    assert (found.standard_error == 0).all()
    torch.testing.assert_close(found.psnr, -10 * expected.log10(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cramer_rao_by_lanczos_is_the_dense_one(quick, kind):
    variance = variances(quick.jacobian, kind)
    exact = cramer_rao_floor(quick.jacobian, variance).mse
    few = cramer_rao_floor(quick.jacobian, variance, method="lanczos", generator=seeded())
    assert ((few.mse - exact).abs() < 4 * few.standard_error).all()
    # The error falls as one over the root of the probes: 200 are worth 4% here.
    many = cramer_rao_floor(quick.jacobian, variance, method="lanczos", probes=200, generator=seeded())
    torch.testing.assert_close(many.mse, exact, rtol=0.04, atol=0)
    assert ((many.mse - exact).abs() < 4 * many.standard_error).all()
    assert (many.undetermined == 0).all()


def test_quadrature_stopped_early_is_too_low(cross_entropy, batch):
    jacobian = make_case("lenet-sigmoid-uniform", cross_entropy, batch).jacobian
    full, early = (
        cramer_rao_floor(jacobian, 1e-6, method="lanczos", probes=4, steps=steps, generator=seeded())
        for steps in (64, 10)
    )
    assert (early.mse < full.mse).all()
    assert not early.converged.any()
    assert full.converged.all()


def test_cramer_rao_is_the_error_of_least_squares(case):
    """Monte Carlo: the best unbiased estimator of the linear model has just this error."""
    variance, samples, j = 1e-6, 2000, case.dense[0]
    noise = variance**0.5 * torch.randn(j.shape[-1], samples, generator=seeded(), dtype=torch.float64)
    errors = torch.linalg.pinv(j.T) @ noise
    floor = cramer_rao_floor(case.jacobian, variance).mse[0]
    torch.testing.assert_close(errors.square().mean(), floor, rtol=0.05, atol=0)


def test_a_layer_that_is_not_sent_has_infinite_variance(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    names = list(jacobian.parameters)
    sent = dict.fromkeys(names, 1e-6)
    sent[names[0]] = math.inf
    without = cramer_rao_floor(jacobian, sent)
    assert (without.mse > cramer_rao_floor(jacobian, 1e-6).mse).all()
    # Only the first layer's gradient tells its input apart: with the last bias alone 64 unknowns meet 9 equations.
    last = dict.fromkeys(names, math.inf) | {names[-1]: 1e-6}
    for method in ("dense", "lanczos"):
        found = cramer_rao_floor(jacobian, last, method=method, generator=seeded())
        assert (found.undetermined - 55 <= 1).all()
        assert torch.isfinite(found.mse).all()


def test_noise_in_the_range_gives_the_trace_of_its_covariance(quick):
    for method in ("dense", "gram", "lanczos"):
        found = cramer_rao_floor(quick.jacobian, covariance=PRIOR.apply, method=method, probes=400, generator=seeded())
        expected = torch.full((2,), PRIOR.std**2, dtype=torch.float64)
        torch.testing.assert_close(found.mse, expected, rtol=0.03 if method == "lanczos" else 1e-6, atol=0)


# ---------------------------------------------------------------------- Bayes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dense", "gram"])
def test_bayes_is_the_posterior_variance(case, kind, method):
    variance = variances(case.jacobian, kind)
    information = (case.dense / flat_variance(case.jacobian, variance)) @ case.dense.mT
    found = bayes_floor(case.jacobian, PRIOR, variance, method=method)
    torch.testing.assert_close(found.mse, posterior_mse(case.c, torch.linalg.inv(information)), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.prior_mse, torch.full((2,), PRIOR.std**2, dtype=torch.float64))
    assert found.undetermined is None
    assert (found.psnr > found.prior_psnr).all()


@pytest.mark.parametrize("variance", [1e-9, 1e-6, 1e-3, 1.0])
def test_bayes_by_lanczos_is_the_dense_one(quick, variance):
    exact = bayes_floor(quick.jacobian, PRIOR, variance).mse
    few = bayes_floor(quick.jacobian, PRIOR, variance, method="lanczos", generator=seeded())
    assert few.converged.all()
    torch.testing.assert_close(few.mse, exact, rtol=0.12, atol=0)
    many = bayes_floor(
        quick.jacobian, PRIOR, variance, method="lanczos", probes=400, tolerance=1e-4, generator=seeded()
    )
    torch.testing.assert_close(many.mse, exact, rtol=0.02, atol=0)
    assert ((many.mse - exact).abs() < 4 * many.standard_error + 1e-4 * exact).all()


def test_structured_noise_by_lanczos(quick):
    variance = variances(quick.jacobian, "per element")
    exact = bayes_floor(quick.jacobian, PRIOR, variance).mse
    found = bayes_floor(quick.jacobian, PRIOR, variance, method="lanczos", probes=400, generator=seeded())
    torch.testing.assert_close(found.mse, exact, rtol=0.02, atol=0)


def test_the_standard_error_is_honest(quick):
    exact = bayes_floor(quick.jacobian, PRIOR, 1e-5).mse
    runs = [
        bayes_floor(quick.jacobian, PRIOR, 1e-5, method="lanczos", tolerance=1e-5, generator=seeded(s))
        for s in range(40)
    ]
    off = torch.stack([(run.mse - exact) / run.standard_error for run in runs])
    assert 0.6 < off.square().mean().sqrt() < 1.7
    assert off.mean().abs() < 0.5


@pytest.mark.parametrize("method", ["dense", "gram", "lanczos"])
def test_noise_drawn_from_the_prior_leaves_a_known_share(quick, method):
    """`d ~ N(0, s C)`: `s / (1 + s)` of the prior's variance, by both ways of saying it."""
    options = {"method": method, "probes": 200, "tolerance": 1e-6, "generator": seeded()}
    expected = torch.full((2,), 0.5 / 1.5 * PRIOR.std**2, dtype=torch.float64)
    by_function = bayes_floor(quick.jacobian, PRIOR, whitened=lambda w: 0.5, **options)
    by_product = bayes_floor(quick.jacobian, PRIOR, covariance=lambda u: 0.5 * PRIOR.apply(u), **options)
    torch.testing.assert_close(by_function.mse, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_product.mse, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_any_covariance(quick, method):
    """Noise in the smallest eigenvectors of `J J^T`, a covariance without an inverse."""
    vectors = spectrum(quick.jacobian).vectors[:, -16:]

    def covariance(u):
        parts = torch.einsum("rkn,rn->rk", vectors, u.flatten(1))
        return 0.1 * torch.einsum("rk,rkn->rn", parts, vectors).reshape(u.shape)

    expected = posterior_mse(quick.c, 0.1 * vectors.mT @ vectors)
    found = bayes_floor(
        quick.jacobian, PRIOR, covariance=covariance, method=method, probes=400, tolerance=1e-6, generator=seeded()
    )
    torch.testing.assert_close(found.mse, expected, rtol=1e-6 if method == "dense" else 0.02, atol=0)


def test_a_function_of_the_whitened_operator(quick):
    """The reverse water-filling of prior-aware noise, `k(w) = max(0, tau / sqrt(w) - 1)`."""
    values = torch.linalg.eigvalsh(quick.c @ quick.dense @ quick.dense.mT)  # for a scale
    tau = values.amax().sqrt() / 3
    root = torch.linalg.eigh(quick.c)
    half = root.eigenvectors * root.eigenvalues.sqrt() @ root.eigenvectors.T
    w, u = torch.linalg.eigh(half @ quick.dense @ quick.dense.mT @ half)

    def water(w):
        return (tau * w.rsqrt() - 1).clamp_min(0)

    k = half @ (u * water(w)[:, None]) @ u.mT @ half
    for method, rtol in (("dense", 1e-5), ("gram", 1e-5), ("lanczos", 0.02)):
        found = bayes_floor(
            quick.jacobian, PRIOR, whitened=water, method=method, probes=400, tolerance=1e-5, generator=seeded()
        )
        torch.testing.assert_close(found.mse, posterior_mse(quick.c, k), rtol=rtol, atol=0)


def test_bayes_is_the_error_of_the_posterior_mean(case):
    """Monte Carlo: pictures from the prior, gradients with noise, the best estimate there is."""
    variance, samples, r = 1e-5, 2000, 0
    j, c = case.dense[r], case.c
    floor = bayes_floor(case.jacobian, PRIOR, variance).mse[r]
    pictures = PRIOR.sqrt(torch.randn(samples, 1, 8, 8, generator=seeded(1), dtype=torch.float64)).flatten(1)
    noise = variance**0.5 * torch.randn(samples, j.shape[1], generator=seeded(2), dtype=torch.float64)
    observed = pictures @ j + noise
    gain = torch.linalg.inv(j @ j.T / variance + torch.linalg.inv(c)) @ j / variance
    errors = observed @ gain.T - pictures
    torch.testing.assert_close(errors.square().mean(), floor, rtol=0.05, atol=0)


def test_bayes_lies_between_the_prior_and_cramer_rao(case):
    """No gradient at all as the noise grows; Cramer-Rao as the prior widens."""
    for method in ("dense", "lanczos"):
        drowned = bayes_floor(case.jacobian, PRIOR, 1e9, method=method, generator=seeded())
        torch.testing.assert_close(drowned.mse, drowned.prior_mse, rtol=1e-6, atol=0)
    # Flat, so that it is wide in every direction.
    unbiased = cramer_rao_floor(case.jacobian, 1e-6).mse
    wide = PowerLawPrior(std=1e4 * float(unbiased.max()) ** 0.5)
    torch.testing.assert_close(bayes_floor(case.jacobian, wide, 1e-6).mse, unbiased, rtol=1e-2, atol=0)
    assert (bayes_floor(case.jacobian, PRIOR, 1e-6).mse < unbiased).all()


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("method", ["dense", "gram", "lanczos"])
def test_rounds_divide_the_noise(quick, method):
    def options():
        return {"method": method, "generator": seeded()}

    j = quick.jacobian
    for floor in (cramer_rao_floor, lambda *a, **k: bayes_floor(a[0], PRIOR, *a[1:], **k)):
        many, quiet = floor(j, 1e-5, rounds=8, **options()), floor(j, 1e-5 / 8, **options())
        torch.testing.assert_close(many.mse, quiet.mse, rtol=1e-5, atol=0)
        many, quiet = (
            floor(j, covariance=PRIOR.apply, rounds=4, **options()),
            floor(j, covariance=lambda u: PRIOR.apply(u) / 4, **options()),
        )
        torch.testing.assert_close(many.mse, quiet.mse, rtol=1e-5, atol=0)
    many = bayes_floor(j, PRIOR, whitened=lambda w: 1.0, rounds=4, **options())
    torch.testing.assert_close(many.mse, many.prior_mse * 0.2, rtol=1e-5, atol=0)


def test_the_joint_floor_is_above_the_floors_of_each(convnet, cross_entropy, batch):
    """An attacker who must find the whole batch does worse; the joint operator is one problem."""
    gradient = LossGradient(convnet, cross_entropy)
    each = bayes_floor(InputJacobian(gradient, *batch), PRIOR, 1e-6).mse
    joint = InputJacobian(gradient, *batch, per_example=False)
    exact = bayes_floor(joint, PRIOR, 1e-6)
    assert exact.mse.shape == (1,)
    assert exact.mse > each.mean()
    found = bayes_floor(joint, PRIOR, 1e-6, method="lanczos", probes=100, generator=seeded())
    torch.testing.assert_close(found.mse, exact.mse, rtol=0.03, atol=0)
    assert cramer_rao_floor(joint, 1e-6).mse > cramer_rao_floor(InputJacobian(gradient, *batch), 1e-6).mse.mean()


def test_float32_is_measured_in_float64_where_the_matrix_fits(cross_entropy, batch):
    torch.manual_seed(0)
    model = digits_convnet()
    single = InputJacobian(LossGradient(model, cross_entropy), batch[0].float(), batch[1])
    double = single.in_dtype(torch.float64)
    for floor in (lambda j: cramer_rao_floor(j, 1e-6), lambda j: bayes_floor(j, PRIOR, 1e-6)):
        assert floor(single).mse.dtype == torch.float64
        torch.testing.assert_close(floor(single).mse, floor(double).mse, rtol=1e-9, atol=0)
    weights = torch.linspace(0.1, 1, 64).reshape(8, 8)  # a covariance that holds single-precision tensors

    def diagonal(u):
        return torch.einsum("ij,bcij->bcij", weights, u)

    exact, found = (
        bayes_floor(single, PRIOR, covariance=diagonal, method=method, generator=seeded())
        for method in ("dense", "lanczos")
    )
    torch.testing.assert_close(found.mse, exact.mse, rtol=0.04, atol=0)
    torch.testing.assert_close(
        cramer_rao_floor(single, covariance=diagonal).mse,
        torch.full((4,), 0.55).double(),
        rtol=1e-5,
        atol=0,
    )
    found = bayes_floor(single, PRIOR, 1e-6, method="lanczos", probes=100, generator=seeded())
    torch.testing.assert_close(found.mse, bayes_floor(double, PRIOR, 1e-6).mse, rtol=0.04, atol=0)


def test_a_prior_of_ones_own(quick):
    class Flat:
        def sqrt(self, x):
            return 0.3 * x

    for method in ("dense", "lanczos"):
        found = bayes_floor(quick.jacobian, Flat(), 1e9, method=method, generator=seeded())
        torch.testing.assert_close(found.prior_mse, torch.full((2,), 0.09, dtype=torch.float64))
        torch.testing.assert_close(found.mse, found.prior_mse, rtol=1e-5, atol=0)


def test_the_same_generator_gives_the_same_floor(case):
    first, second = (
        bayes_floor(case.jacobian, PRIOR, 1e-6, method="lanczos", generator=seeded(3)).mse for _ in range(2)
    )
    assert torch.equal(first, second)


def test_bad_arguments(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    name = next(iter(jacobian.parameters))
    fine = dict.fromkeys(jacobian.parameters, 1.0)
    for floor in (
        lambda *a, **k: cramer_rao_floor(jacobian, *a, **k),
        lambda *a, **k: bayes_floor(jacobian, PRIOR, *a, **k),
    ):
        with pytest.raises(InputError, match="`variance` must be positive and finite, got 0"):
            floor(0.0)
        with pytest.raises(InputError, match="No parameter was sent"):
            floor({})
        with pytest.raises(InputError, match="has shape"):
            floor(fine | {name: torch.ones(2)})
        with pytest.raises(InputError, match="must be positive, its smallest value is -1"):
            floor(fine | {name: -1.0})
        with pytest.raises(InputError, match="Give the noise once"):
            floor()
        with pytest.raises(InputError, match="Give the noise once"):
            floor(1.0, covariance=PRIOR.apply)
        with pytest.raises(InputError, match="`rounds` must be at least 1, got 0"):
            floor(1.0, rounds=0)
        with pytest.raises(InputError, match="`probes` must be at least 2"):
            floor(1.0, probes=1)
        with pytest.raises(InputError, match='`method` must be "auto", "dense", "gram" or "lanczos"'):
            floor(1.0, method="magic")
        with pytest.raises(InputError, match="`covariance` must keep the inputs' shape"):
            floor(covariance=lambda u: u.flatten(1))
    with pytest.raises(InputError, match="The floor is not finite: `covariance`"):
        bayes_floor(jacobian, PRIOR, covariance=lambda u: math.nan * u)
    with pytest.raises(InputError, match="`prior` must have a method `sqrt`"):
        bayes_floor(jacobian, 0.25, 1.0)
