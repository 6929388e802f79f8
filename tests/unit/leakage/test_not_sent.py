"""Measures of a gradient of which only some parameters were sent, against the dense Jacobian with rows left out."""

import pytest
import torch
from torch import nn

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.functional.restriction import sent_only
from gradguard.leakage import bayes_floor, cramer_rao_floor, influence, influence_lower_bound, spectrum
from gradguard.linalg.covariances import PowerLawPrior
from references import dense_influence, dense_jacobian

#: Of the model below: the head only, all but the first weight, one bias.
SENT = (("4.weight", "4.bias"), ("0.bias", "2.weight", "2.bias", "4.weight", "4.bias"), ("0.bias",))


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, y = torch.rand(3, 6).double(), torch.tensor([0, 4, 2])
    return model, nn.CrossEntropyLoss(), x, y


def columns(model, names):
    """Which columns of the flat gradient belong to `names`."""
    return torch.cat([torch.full((p.numel(),), n in names) for n, p in model.named_parameters()])


def noise(model, names):
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
        if n in names
    }


def dense(setting, names):
    model, loss_fn, x, y = setting
    return [dense_jacobian(model, loss_fn, x[[i]], y[[i]])[:, columns(model, names)] / len(x) for i in range(len(x))]


@pytest.mark.parametrize("names", SENT)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_products(setting, names, chunk_size):
    jacobian = sent_only(InputJacobian(LossGradient(*setting[:2]), *setting[2:], chunk_size=chunk_size), names)
    delta, matrices = noise(setting[0], names), dense(setting, names)
    vector = torch.cat([d.flatten() for d in delta.values()])
    u = torch.rand_like(setting[2])
    expected = torch.stack([m @ vector for m in matrices])
    gram = torch.stack([m @ m.T @ v for m, v in zip(matrices, u, strict=True)])
    images = torch.stack([v @ m for m, v in zip(matrices, u, strict=True)])
    torch.testing.assert_close(jacobian.matvec(delta), expected)
    torch.testing.assert_close(jacobian.gram(u), gram)
    torch.testing.assert_close(jacobian.gram_operator().matvec(u), gram)
    torch.testing.assert_close(jacobian.transpose_operator().matvec(u), images)
    torch.testing.assert_close(jacobian.transpose_operator().rmatvec(images), gram)
    torch.testing.assert_close(jacobian.dense(), torch.stack(matrices))
    assert list(jacobian.rmatvec(u)) == list(delta)


@pytest.mark.parametrize("names", SENT[:2])
@pytest.mark.parametrize("method", ["dense", "lsmr", "lanczos"])
def test_influence_with_parameters_that_were_not_sent(setting, names, method):
    jacobian = InputJacobian(LossGradient(*setting[:2]), *setting[2:])
    delta = noise(setting[0], names)
    found = influence(jacobian, delta, damping=1e-4, method=method, tolerance=1e-12)
    vector = torch.cat([d.flatten() for d in delta.values()])
    expected = torch.stack([dense_influence(m, vector, 1e-4) for m in dense(setting, names)])
    torch.testing.assert_close(found.displacement, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("per_example", [True, False])
def test_the_lower_bound_is_below_influence(setting, per_example):
    jacobian = InputJacobian(LossGradient(*setting[:2]), *setting[2:], per_example=per_example)
    delta = noise(setting[0], SENT[0])
    bound, value = influence_lower_bound(jacobian, delta).value, influence(jacobian, delta).value
    assert (bound > 0).all()
    assert (bound <= value * (1 + 1e-9)).all()


def test_the_floor_of_a_partial_gradient(setting):
    jacobian = InputJacobian(LossGradient(*setting[:2]), *setting[2:])
    names = SENT[1]
    floor = cramer_rao_floor(jacobian, dict.fromkeys(names, 0.25))
    expected = [0.25 * torch.linalg.inv(m @ m.T).trace() / 6 for m in dense(setting, names)]
    torch.testing.assert_close(floor.mse, torch.stack(expected), rtol=1e-8, atol=0)
    torch.testing.assert_close(cramer_rao_floor(sent_only(jacobian, names), 0.25).mse, floor.mse)
    assert (floor.mse > cramer_rao_floor(jacobian, 0.25).mse).all()


@pytest.mark.parametrize("method", ["dense", "gram", "lanczos"])
def test_the_bayes_floor_of_a_partial_gradient(cross_entropy, digit_pictures, convnet, method):
    x, y = digit_pictures.images[:2].double(), digit_pictures.labels[:2]
    jacobian, prior = InputJacobian(LossGradient(convnet, cross_entropy), x, y), PowerLawPrior()
    names = list(jacobian.parameters)[2:]
    options = {"method": method, "generator": torch.Generator().manual_seed(0)}
    part = bayes_floor(jacobian, prior, dict.fromkeys(names, 1e-6), **options)
    restricted = bayes_floor(sent_only(jacobian, names), prior, 1e-6, method="dense")
    tolerance = {"rtol": 0.1, "atol": 0} if method == "lanczos" else {"rtol": 1e-6, "atol": 0}  # 32 random probes
    torch.testing.assert_close(part.mse, restricted.mse, **tolerance)
    assert (restricted.mse > bayes_floor(jacobian, prior, 1e-6, method="dense").mse).all()


def test_the_spectrum_of_what_was_sent(setting):
    jacobian = sent_only(InputJacobian(LossGradient(*setting[:2]), *setting[2:]), SENT[0])
    expected = torch.stack([torch.linalg.svdvals(m) ** 2 for m in dense(setting, SENT[0])])
    for method in ("dense", "gram"):
        values = spectrum(jacobian, "all", method=method).values
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-12)


def test_names_of_no_parameter_and_no_name_are_refused(setting):
    jacobian = InputJacobian(LossGradient(*setting[:2]), *setting[2:])
    delta = noise(setting[0], SENT[0])
    with pytest.raises(InputError, match=r"\['head'\] are no parameters"):
        influence(jacobian, delta | {"head": torch.zeros(3)})
    with pytest.raises(InputError, match="No parameter was sent"):
        influence(jacobian, {})
    with pytest.raises(InputError, match="No parameter was sent"):
        cramer_rao_floor(jacobian, {})
    with pytest.raises(InputError, match=r"has shape \(2,\)"):
        influence_lower_bound(jacobian, {"0.bias": torch.zeros(2)})
    with pytest.raises(InputError, match="keyed as `named_parameters"):
        influence(jacobian, torch.zeros(3))
