import pytest
import torch

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.functional.vectors import flatten
from gradguard.leakage import influence, influence_lower_bound, spectrum
from gradguard.zoo.models import digits_convnet, lenet, uniform_init_
from references import dense_influence, dense_jacobian

MODELS = {
    "convnet": lambda: digits_convnet(),
    "convnet-softplus": lambda: digits_convnet(activation="softplus"),
    "lenet-sigmoid-uniform": lambda: uniform_init_(lenet(image_size=8)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(1)
    return MODELS[request.param]().double()


def perturbation(jacobian, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: 1e-3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in jacobian.parameters.items()}


@pytest.mark.parametrize("method", ["lanczos", "lsmr", "dense"])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
def test_influence_is_the_dense_references(model, cross_entropy, batch, method, damping):
    inputs, targets = batch[0][:2], batch[1][:2]
    jacobian = InputJacobian(LossGradient(model, cross_entropy), inputs, targets)
    delta = perturbation(jacobian)
    found = influence(jacobian, delta, method=method, damping=damping)
    assert found.converged.all()
    for r in range(2):
        dense = dense_jacobian(model, cross_entropy, inputs[r : r + 1], targets[r : r + 1]) / 2
        expected = dense_influence(dense, flatten(delta), damping)
        torch.testing.assert_close(found.value[r], expected.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            found.displacement[r].flatten(), expected, rtol=1e-5, atol=1e-6 * float(expected.norm())
        )


@pytest.mark.parametrize("method", ["lanczos", "lsmr", "dense"])
def test_joint_influence_is_the_dense_references(cross_entropy, batch, method):
    torch.manual_seed(1)
    model = digits_convnet().double()
    inputs, targets = batch[0][:2], batch[1][:2]
    jacobian = InputJacobian(LossGradient(model, cross_entropy), inputs, targets, per_example=False)
    delta = perturbation(jacobian)
    expected = dense_influence(dense_jacobian(model, cross_entropy, inputs, targets), flatten(delta))
    found = influence(jacobian, delta, method=method)
    assert found.value.shape == (1,)
    torch.testing.assert_close(found.value[0], expected.norm(), rtol=1e-6, atol=0)


def test_the_lower_bound_is_always_below(model, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch)
    delta = perturbation(jacobian)
    exact = influence(jacobian, delta).value
    for iterations in (1, 2, 5, 20, None):
        bound = influence_lower_bound(jacobian, delta, max_iterations=iterations)
        assert (bound.value <= exact * (1 + 1e-12)).all()
        assert (bound.value > 0).all()


def test_the_bound_is_equation_5_with_a_sure_denominator(model, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch)
    delta = perturbation(jacobian)
    dense = jacobian.dense()
    projected, largest = (dense @ flatten(delta)).norm(dim=-1), torch.linalg.matrix_norm(dense, ord=2) ** 2
    for tolerance in (0.1, 1e-6):
        bound = influence_lower_bound(jacobian, delta, tolerance=tolerance)
        assert bound.converged.all()
        torch.testing.assert_close(bound.lambda_max, largest, rtol=0.1 * tolerance, atol=0)
        torch.testing.assert_close(bound.value, projected / (bound.lambda_max + bound.residual), rtol=1e-9, atol=0)
        assert (bound.residual <= tolerance * bound.lambda_max).all()
        assert (bound.value <= projected / largest).all()


def test_the_trace_bounds_too(model, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch)
    delta = perturbation(jacobian)
    sure = influence_lower_bound(jacobian, delta, method="trace", generator=torch.Generator().manual_seed(0))
    near = influence_lower_bound(jacobian, delta, tolerance=1e-6)
    assert (sure.value <= near.value).all()
    assert (sure.value >= near.value / 1000).all()
    torch.testing.assert_close(sure.value, sure.projected / sure.lambda_max)


def test_chunks_give_the_same(convnet, cross_entropy, batch):
    gradient = LossGradient(convnet, cross_entropy)
    whole, parts = (InputJacobian(gradient, *batch, chunk_size=c) for c in (None, 3))
    delta = perturbation(whole)
    rows = {n: torch.stack([d * (i + 1) for i in range(4)]) for n, d in delta.items()}
    random = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for perturbed in (delta, rows):
        torch.testing.assert_close(influence(whole, perturbed).value, influence(parts, perturbed).value)
        options = {"random": random, "tolerance": 0.0, "max_iterations": 12}
        one, other = (influence_lower_bound(j, perturbed, **options) for j in (whole, parts))
        torch.testing.assert_close(one.value, other.value)
        assert one.vectors.shape == other.vectors.shape == (4, 64)


def test_half_precision_models_are_measured_in_float64(convnet, cross_entropy, batch):
    """In bfloat16 itself the smallest eigenvalues are noise."""
    inputs, targets = batch[0][:2], batch[1][:2]
    half = convnet.bfloat16()
    delta = perturbation(InputJacobian(LossGradient(half, cross_entropy), inputs.bfloat16(), targets))
    found = influence(InputJacobian(LossGradient(half, cross_entropy), inputs.bfloat16(), targets), delta)
    exact = influence(
        InputJacobian(LossGradient(half, cross_entropy, dtype=torch.float64), inputs.bfloat16(), targets), delta
    )
    torch.testing.assert_close(found.value.double(), exact.value, rtol=1e-2, atol=0)


def test_the_bound_is_tight_along_the_leading_eigenvector(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), batch[0][:1], batch[1][:1])
    leading = spectrum(jacobian).vectors[:, 0].reshape(1, 1, 8, 8)
    delta = {n: v[0] for n, v in jacobian.rmatvec(leading).items()}
    torch.testing.assert_close(influence(jacobian, delta).value, torch.ones(1, dtype=torch.float64))
    bound = influence_lower_bound(jacobian, delta, tolerance=1e-10)
    torch.testing.assert_close(bound.value, torch.ones(1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_perturbation_in_the_range_moves_the_picture_by_just_that(convnet, cross_entropy, batch):
    """`(J J^T)^{-1} J J^T d = d`: the identity that directional defenses stand on."""
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    d = torch.randn_like(batch[0])
    torch.testing.assert_close(influence(jacobian, jacobian.rmatvec(d)).displacement, d, rtol=1e-6, atol=1e-7)


def test_influence_is_linear_and_warm_starts_help(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    delta = perturbation(jacobian)
    twice = {n: 2 * d for n, d in delta.items()}
    torch.testing.assert_close(influence(jacobian, twice).value, 2 * influence(jacobian, delta).value)
    cold = influence_lower_bound(jacobian, delta, tolerance=1e-8)
    warm, again = (
        influence_lower_bound(jacobian, delta, tolerance=1e-2, confidence=None, start=s) for s in (cold.vectors, None)
    )
    assert warm.iterations < again.iterations


def test_spectrum_is_that_of_the_dense_gram_matrix(model, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(model, cross_entropy), *batch)
    found = spectrum(jacobian)
    singular = torch.linalg.svdvals(jacobian.dense())
    assert found.complete
    torch.testing.assert_close(found.values, singular**2, rtol=1e-6, atol=0)


def test_bad_arguments(convnet, cross_entropy, batch):
    jacobian = InputJacobian(LossGradient(convnet, cross_entropy), *batch)
    with pytest.raises(InputError, match="`damping` must not be negative"):
        influence(jacobian, perturbation(jacobian), damping=-1.0)
    with pytest.raises(InputError, match="No parameter was sent"):
        influence(jacobian, {})
    with pytest.raises(InputError, match="3 perturbations for 4 problems"):
        influence(jacobian, {n: p.expand(3, *p.shape) for n, p in perturbation(jacobian).items()})
