"""Products layer by layer against `torch.func`'s, through the model as a whole, and against dense double backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputJacobian, LossGradient
from gradguard.functional.layer_by_layer import LayerByLayer
from gradguard.functional.problems import Problems
from gradguard.functional.vectors import flatten
from gradguard.zoo.models import digits_convnet, fcn, lenet, resnet
from references import dense_jacobian


class Attention(nn.Module):
    """A transformer block of tapped modules, with learned positions, on `(B, tokens, 8)`."""

    def __init__(self):
        super().__init__()
        self.position, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(F.gelu(x)).mean(1)


class Twice(nn.Module):
    """One convolution called twice, a frozen one, and a group norm."""

    def __init__(self):
        super().__init__()
        self.frozen, self.shared = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(64, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.norm(self.shared(torch.tanh(self.frozen(x)))))
        return self.head(torch.tanh(self.shared(x)).flatten(1))


class Functional(nn.Module):
    """A weight that no module's forward sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(64, 5), nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return self.layer(x.flatten(1) * (1 + self.scale))


class Borrowed(nn.Module):
    """A module's weight used behind its back as well."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(torch.tanh(self.layer(x.flatten(1))), self.layer.weight)))


class Mixing(nn.Module):
    """Subtracts the batch's mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(torch.tanh(x - x.mean(0)))


def conv1d():
    head = [nn.Tanh(), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(nn.Conv1d(2, 6, 3, 2, 1, groups=2), nn.Tanh(), nn.Conv1d(6, 4, 3, dilation=2), *head)


def grouped():
    first = nn.Conv2d(4, 8, 3, stride=(1, 2), padding=(1, 0), groups=4)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(8, 4, 1, groups=2), nn.Flatten(), nn.Linear(96, 5))


MODELS = {
    "convnet": (lambda: digits_convnet(num_classes=5), (1, 8, 8)),
    "lenet": (lambda: lenet(image_size=8), (1, 8, 8)),
    "fcn": (lambda: fcn((64, 20, 10), bias=True), (1, 8, 8)),
    "resnet": (lambda: resnet(10, width=4, in_channels=1), (1, 8, 8)),
    "resnet50": (lambda: resnet(50, width=2, in_channels=1, large_inputs=True), (1, 16, 16)),
    "attention": (Attention, (6, 8)),
    "twice": (Twice, (1, 8, 8)),
    "conv1d": (conv1d, (2, 12)),
    "grouped": (grouped, (4, 6, 10)),
}
REFUSED = {"functional": Functional, "borrowed": Borrowed, "mixing": Mixing}


def case(make, shape, **options):
    torch.manual_seed(0)
    inputs, targets = torch.rand(3, *shape, dtype=torch.float64), torch.arange(3)
    return LossGradient(make().double().eval(), nn.CrossEntropyLoss()), inputs, targets


def slow(jacobian):
    """The same operator through `torch.func`."""
    jacobian.way = "forward over reverse"
    return jacobian


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_functional_way(name, per_example, chunk_size):
    gradient, inputs, targets = case(*MODELS[name])
    fast = InputJacobian(gradient, inputs, targets, per_example=per_example, chunk_size=chunk_size)
    other = slow(InputJacobian(gradient, inputs, targets, per_example=per_example))
    assert fast.way == "layer by layer"
    u = torch.randn_like(inputs)
    shared = {n: torch.randn_like(p) for n, p in fast.parameters.items()}
    torch.testing.assert_close(flatten(fast.rmatvec(u)), flatten(other.rmatvec(u)))
    torch.testing.assert_close(fast.matvec(shared), other.matvec(shared))
    torch.testing.assert_close(fast.gram(u), other.gram(u))
    if per_example:
        own = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in fast.parameters.items()}
        torch.testing.assert_close(fast.matvec(own), other.matvec(own))


@pytest.mark.parametrize("name", MODELS)
def test_trials_are_those_of_the_functional_way(name):
    """Problems of several examples each."""
    gradient, inputs, targets = case(*MODELS[name])
    inputs, targets = inputs[[0, 1, 1, 2]].unflatten(0, (2, 2)), targets[[0, 1, 1, 2]].unflatten(0, (2, 2))
    fast = InputJacobian.of_trials(gradient, inputs, targets)
    other = slow(InputJacobian.of_trials(gradient, inputs, targets))
    u = torch.randn_like(inputs)
    torch.testing.assert_close(flatten(fast.rmatvec(u)), flatten(other.rmatvec(u)))
    torch.testing.assert_close(fast.gram(u), other.gram(u))


@pytest.mark.parametrize("name", ["convnet", "attention", "twice"])
def test_dense_is_the_dense_reference(name):
    gradient, inputs, targets = case(*MODELS[name])
    for chunk_size in (7, 64):
        dense = InputJacobian(gradient, inputs, targets).dense(chunk_size=chunk_size)
        for r in range(3):
            rows = slice(r, r + 1)
            reference = dense_jacobian(gradient.model, gradient.loss_fn, inputs[rows], targets[rows]) / 3
            torch.testing.assert_close(dense[r], reference)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_layer_accounts_for_goes_the_functional_way(name):
    """Found out even where, as here for `scale`, a parameter is zero."""
    gradient, inputs, targets = case(REFUSED[name], (1, 8, 8))
    jacobian = InputJacobian(gradient, inputs, targets)
    assert jacobian.way == ("coupled" if name == "mixing" else "forward over reverse")
    reference = dense_jacobian(gradient.model, gradient.loss_fn, inputs, targets)
    torch.testing.assert_close(jacobian.dense().flatten(0, 1), reference)
    torch.testing.assert_close(jacobian.joint().dense()[0], reference)


def test_gradients_are_the_examples_own():
    gradient, inputs, targets = case(*MODELS["twice"])
    found = LayerByLayer(Problems(gradient, gradient.parameters(), inputs[:, None], targets[:, None])).gradients()
    torch.testing.assert_close(found, gradient.per_example(inputs, targets))


def test_the_model_is_left_as_it_was():
    gradient, inputs, targets = case(*MODELS["twice"])
    before = {n: p.clone() for n, p in gradient.model.named_parameters()}
    InputJacobian(gradient, inputs, targets).gram(inputs)
    for module in gradient.model.modules():
        assert "forward" not in vars(module)
    for n, p in gradient.model.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is None


def test_a_model_that_changes_is_asked_again():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    inputs, targets = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.arange(2)
    gradient = LossGradient(model, nn.CrossEntropyLoss())
    assert InputJacobian(gradient, inputs, targets).way == "layer by layer"
    nn.utils.parametrizations.weight_norm(model[1])
    assert InputJacobian(gradient, inputs, targets).way != "layer by layer"
