"""SPEAR on real digits: exact batches, their labels, what it says of others, and its parts against plain algebra."""

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import SPEAR, Observation
from gradguard.attacks._closed_form.sparse_columns import SparseColumns, factors
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.zoo.models import fcn, lenet

CE = nn.CrossEntropyLoss()


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def network(width, *, bias=True, hidden=1, seed=0):
    return seeded(lambda: fcn((64, *[width] * hidden, 10), activation="relu", bias=bias), seed)


def drawn(pictures, count, seed=0):
    """`count` digits and their labels, without the truth's own order."""
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    return pictures.images[chosen], pictures.labels[chosen]


def observe(model, x, y, *, loss=CE, dtype=torch.float64, labels=False, noise=0.0, **options):
    sent = LossGradient(model, loss, dtype=dtype)(x, y)
    if noise:
        generator = torch.Generator().manual_seed(0)
        sent = {
            n: g + noise * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=generator, dtype=dtype)
            for n, g in sent.items()
        }
    return Observation(
        loss_gradient=LossGradient(model, loss),
        sent=sent,
        input_shape=x.shape[1:],
        batch_size=len(x),
        labels=y if labels else None,
        **options,
    )


def run(observation, attack=None):
    return (attack or SPEAR())(observation, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- whole batches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("count", "width", "bias"),
    [
        *((1, 20, bias) for bias in (True, False)),
        *((2, 50, bias) for bias in (True, False)),
        *((4, 100, bias) for bias in (True, False)),
        (8, 400, True),
        (6, 200, False),  # without a bias the search for eight is ten times as long
    ],
)
def test_a_batch_comes_back_exactly_with_its_labels(digit_pictures, count, width, bias, dtype):
    x, y = drawn(digit_pictures, count)
    found = run(observe(network(width, bias=bias), x, y, dtype=dtype))
    score = gg.leakage.fidelity(found.inputs, x)
    assert float(score.psnr.min()) > (150 if dtype == torch.float64 else 90)
    assert torch.equal(found.labels[score.assignment], y)
    assert torch.equal(found.labels, found.labels.sort().values)
    assert found.converged
    assert found.details["rank"] == found.details["directions"] == count
    assert found.details["score"] == 1.0


def test_gradients_rounded_to_float32_and_kept_in_float64(digit_pictures):
    """The dtype does not tell that they are rounded; what the rank leaves over does."""
    x, y = drawn(digit_pictures, 6)
    model = network(200)
    seen = observe(model, x, y, dtype=torch.float32)
    seen = Observation(
        loss_gradient=seen.loss_gradient,
        sent={n: g.double() for n, g in seen.sent.items()},
        input_shape=seen.input_shape,
        batch_size=6,
    )
    found = run(seen)
    assert found.converged
    assert float(gg.leakage.fidelity(found.inputs, x).psnr.min()) > 90


def test_given_labels_set_the_order(digit_pictures):
    x, y = drawn(digit_pictures, 6, seed=3)
    assert len(y.unique()) > 3
    found = run(observe(network(200), x, y, labels=True))
    assert found.converged
    assert torch.equal(found.labels, y)
    for label in y.unique():
        ours, theirs = found.inputs[y == label], x[y == label]
        assert float(gg.leakage.fidelity(ours, theirs).psnr.min()) > 150


def test_deeper_networks_and_other_losses(digit_pictures):
    x, y = drawn(digit_pictures, 4)
    assert run(observe(network(100, hidden=2), x, y)).converged
    targets = torch.tensor([[0.7], [-0.1], [0.2], [0.5]])  # each its example's own, so the order is the truth's
    model = seeded(lambda: fcn((64, 100, 50, 1), activation="relu", bias=True))
    found = run(observe(model, x, targets, loss=nn.MSELoss(reduction="sum"), labels=True))
    assert found.converged
    assert torch.equal(found.labels, targets)
    assert float((found.inputs - x).abs().max()) < 1e-8


def test_a_binary_loss(digit_pictures):
    x, y = drawn(digit_pictures, 3)
    y = (y[:, None] % 2).float()
    model = seeded(lambda: fcn((64, 100, 50, 1), activation="relu", bias=True))
    found = run(observe(model, x, y, loss=nn.BCEWithLogitsLoss()))
    score = gg.leakage.fidelity(found.inputs, x)
    assert found.converged
    assert torch.equal(found.labels[score.assignment], y)


@pytest.mark.parametrize("labels", [True, False])
def test_copies_are_counted(digit_pictures, labels):
    x, y = drawn(digit_pictures, 4)
    x, y = torch.cat([x, x[1:2], x[1:2]]), torch.cat([y, y[1:2], y[1:2]])
    found = run(observe(network(100), x, y, labels=labels))
    assert found.details["rank"] == 4
    assert found.details["copies"] == 2
    assert found.converged
    assert float(gg.leakage.fidelity(found.inputs, x).psnr.min()) > 150


def test_mnist(real_pictures):
    x, y = drawn(real_pictures("mnist_2000"), 8)
    model = seeded(lambda: fcn((784, 200, 10), activation="relu", bias=True))
    found = run(observe(model, x, y, dtype=torch.float32))
    assert found.converged
    assert float(gg.leakage.fidelity(found.inputs, x).psnr.min()) > 90


# ---------------------------------------------------------------------- what it says where it cannot


def test_noise_is_not_called_exact(digit_pictures):
    x, y = drawn(digit_pictures, 4)
    found = run(observe(network(100), x, y, noise=0.1), SPEAR(max_samples=2000))
    assert not found.converged
    assert found.inputs.shape == x.shape
    assert torch.isfinite(found.inputs).all()
    assert found.matching_loss > 1e-6
    assert found.details["noise"] > 1e-4


def test_without_enough_zeros_it_says_so(digit_pictures):
    """12 units leave each of 6 digits fewer zeros than it takes to see one."""
    x, y = drawn(digit_pictures, 6)
    found = run(observe(network(12), x, y), SPEAR(max_samples=3000))
    assert not found.converged
    assert found.details["samples"] == 3000
    assert found.inputs.shape == x.shape


def test_targets_that_are_no_classes_and_not_given(digit_pictures):
    """The inputs come back all the same; that their gradient is the sent one cannot be shown."""
    x, _ = drawn(digit_pictures, 3)
    targets = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    found = run(observe(network(100), x, targets, loss=nn.MSELoss()))
    assert found.labels is None
    assert not found.converged
    assert found.details["score"] == 1.0
    assert float(gg.leakage.fidelity(found.inputs, x).psnr.min()) > 150


def test_the_same_generator_gives_the_same_result(digit_pictures):
    x, y = drawn(digit_pictures, 5)
    seen = observe(network(60), x, y)
    one, two = run(seen), run(seen)
    assert torch.equal(one.inputs, two.inputs)
    assert one.details == two.details


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lenet(image_size=8, activation="relu"), "begins with '0' .Conv2d"),
        (lambda: fcn((64, 50, 10), activation="tanh"), "needs a ReLU right after .* '1': .* Here '2' .Tanh. follows"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "Here nothing follows"),
    ],
)
def test_other_models_are_refused_by_name(digit_pictures, build, message):
    x, y = drawn(digit_pictures, 2)
    with pytest.raises(UnsupportedModelError, match=message):
        run(observe(seeded(build), x, y))


def test_a_frozen_first_layer_is_refused(digit_pictures):
    model = network(50)
    model[1].weight.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="weight of the first layer, '1', is frozen"):
        run(observe(model, *drawn(digit_pictures, 2)))


def test_a_batch_beyond_the_layer_is_refused(digit_pictures):
    x, y = drawn(digit_pictures, 12)
    with pytest.raises(InputError, match=r"is \(10, 65\) and tells at most 10 examples apart; this is a batch of 12"):
        run(observe(network(10), x, y))


def test_options_are_checked():
    with pytest.raises(InputError, match="`max_samples` must be at least 1, got 0"):
        SPEAR(max_samples=0)
    with pytest.raises(InputError, match="`tolerance` must be positive"):
        SPEAR(tolerance=0.0)


# ---------------------------------------------------------------------- its parts, against plain algebra


@pytest.fixture
def split(digit_pictures):
    """The gradient `K X` of five digits, its true `K^T` and its factors."""
    x, y = drawn(digit_pictures, 5)
    x, model = x.double(), network(80).double()
    z = model[1](x.flatten(1)).detach().requires_grad_()
    (k,) = torch.autograd.grad(CE(model[3](z.relu()), y), z)
    gradient = k.mT @ x.flatten(1)
    return gradient, k, factors(gradient, 5, torch.finfo(torch.float64).eps)


def test_factors_multiply_to_the_gradient(split):
    gradient, _, found = split
    assert found.rank == 5
    assert torch.allclose(found.left @ found.right, gradient, atol=1e-15 * float(gradient.norm()) * 100)
    assert torch.allclose(found.right @ found.right.mT, torch.eye(5, dtype=torch.float64))


def test_the_basis_is_that_of_the_examples_derivatives(split):
    _, k, found = split
    columns = SparseColumns(found)
    columns.add(columns.drawn(4000, torch.Generator().manual_seed(0)))
    columns.settle()
    assert columns.complete
    ours = nn.functional.normalize(columns.basis @ found.left.mT)
    angles = (ours @ nn.functional.normalize(k).mT).abs()
    assert torch.allclose(angles.max(1).values, torch.ones(5, dtype=torch.float64))
    assert sorted(angles.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    zeros = (k == 0)[:, columns.alive].sum(1)
    assert torch.equal(columns.zeros, zeros[angles.argmax(1)])


def test_a_mixture_of_two_directions_is_completed(split):
    """`q_0 + 0.7 q_1`, completed with `q_1` in the basis, is `q_0` again."""
    _, k, found = split
    true = torch.linalg.lstsq(found.left, k.mT).solution.mT
    columns = SparseColumns(found)
    columns.add(true[1:])
    again = columns.completed((true[0] + 0.7 * true[1])[None])
    angles = nn.functional.normalize(again * found.values) @ nn.functional.normalize(true[0] * found.values, dim=0)
    assert float(angles.abs().max()) > 1 - 1e-12


def test_drawn_directions_are_orthogonal_to_as_many_rows(split):
    columns = SparseColumns(split[2])
    q = columns.drawn(50, torch.Generator().manual_seed(0))
    products = (nn.functional.normalize(q) @ columns.unit.mT).abs().sort(dim=1).values
    assert float(products[:, :4].max()) < 1e-9
