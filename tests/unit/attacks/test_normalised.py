"""Normalisation and padding in the model: the closed-form attacks and the rank analysis go through them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard.attacks import HGAP, RGAP, SPEAR, Observation
from gradguard.chain import Rewire, all_parameters, walk
from gradguard.errors import UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.leakage import rank_analysis

CE = nn.CrossEntropyLoss()


def psnr(found, true):
    return -10 * math.log10(max(float((found - true).double().square().mean()), 1e-40))


class Normalised(nn.Module):
    """Buffers, as most people write it."""

    def __init__(self, mean=0.3, std=0.25):
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean]))
        self.register_buffer("std", torch.tensor([std]))

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class Checked(Normalised):
    """Not traceable, as torchvision's `Normalize`: looks at its input with Python."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor) or float(x.abs().sum()) < 0:
            raise TypeError("a tensor")
        return super().forward(x)


class Constants(nn.Module):
    """Python numbers, a call with the input on the right, and a tensor made on the spot."""

    def forward(self, x):
        return (1.0 - x).mul(-1.0).add(torch.tensor([0.7], dtype=x.dtype).to(x.device)).div_(0.25)


class InForward(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.mean = torch.tensor([0.3])

    def forward(self, x):
        x = (x - self.mean.to(x)) / x.new_tensor([0.25])
        return self.body(x)


def convnet(activation=nn.Tanh, padding=1):
    return nn.Sequential(
        *[nn.Conv2d(1, 12, 3, padding=padding), activation(), nn.Conv2d(12, 12, 3, padding=1), activation()],
        *[nn.Flatten(), nn.Linear(12 * 64, 10)],
    )


def fcn():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100, bias=False), nn.Tanh(), nn.Linear(100, 10))


def padded(first, second=None):
    layers = convnet(padding=0)
    return nn.Sequential(first, layers[0], layers[1], *layers[2:]) if second is None else second(first, layers)


MODELS = {
    "module": lambda: nn.Sequential(Normalised(), convnet()),
    "opaque": lambda: nn.Sequential(Checked(), convnet()),
    "constants": lambda: nn.Sequential(Constants(), convnet()),
    "in forward": lambda: InForward(convnet()),
    "LeakyReLU": lambda: InForward(convnet(lambda: nn.LeakyReLU(0.2))),
    "FCN": lambda: nn.Sequential(Normalised(), fcn()),
    "FCN, in forward": lambda: InForward(fcn()),
    "FCN, flattened before": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), Normalised(), fcn()),
    "zeros": lambda: padded(nn.ZeroPad2d(1)),
    "zeros, uneven": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 0, 2)), *convnet(padding=0)),
    "reflection": lambda: padded(nn.ReflectionPad2d(1)),
    "replication": lambda: padded(nn.ReplicationPad2d(1)),
    "circular": lambda: padded(nn.CircularPad2d(1)),
    "constant": lambda: padded(nn.ConstantPad2d(1, 0.4)),
    "F.pad": lambda: nn.Sequential(Padded("reflect"), *convnet(padding=0)),
    "normalised, padded": lambda: nn.Sequential(Normalised(), nn.ZeroPad2d(1), *convnet(padding=0)),
    "padded, normalised": lambda: nn.Sequential(nn.ReflectionPad2d(1), Normalised(), *convnet(padding=0)),
    "zeros, normalised": lambda: nn.Sequential(nn.ZeroPad2d(1), Normalised(), nn.Dropout(0.5), *convnet(padding=0)),
    "padded in between": lambda: nn.Sequential(
        *convnet()[:2], nn.ReplicationPad2d(1), nn.Identity(), nn.Conv2d(12, 12, 3), nn.Tanh(), *convnet()[4:]
    ),
    "padded, LeakyReLU": lambda: nn.Sequential(
        *convnet(lambda: nn.LeakyReLU(0.2))[:2], nn.ReflectionPad2d(1), nn.Conv2d(12, 12, 3), nn.LeakyReLU(0.2),
        *convnet()[4:],
    ),
    "flipped": lambda: nn.Sequential(Flipped(), convnet()),
}  # fmt: skip


class Padded(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return F.pad(x, (1, 1, 1, 1), mode=self.mode)


class Flipped(nn.Module):
    def forward(self, x):
        return x.flip(-1).transpose(2, 3)


def observed(model, x, y, **options):
    return Observation(
        loss_gradient=LossGradient(model, CE),
        sent=LossGradient(model, CE, dtype=torch.float64)(x, y),
        input_shape=x.shape[1:],
        batch_size=len(x),
        **options,
    )


def built(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attack", [RGAP(), HGAP()], ids=lambda a: a.name)
def test_the_picture_comes_back_in_its_own_units(digit_pictures, name, attack):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    result = attack(observed(built(name), x, y))
    assert psnr(result.inputs, x) > 90
    assert result.converged
    assert torch.equal(result.labels, y)


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_is_the_model(digit_pictures, name):
    model = built(name)
    gradient = LossGradient(model, CE, dtype=torch.float64)
    chain = walk(gradient, (1, 8, 8))
    x = 3 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gradient.outputs(gradient.parameters(), x[None])[0]
    assert torch.allclose(chain(x, all_parameters(gradient)), expected, atol=1e-12)
    layer, index = chain.layers[0], chain.affine_indices[0]
    inner = chain(x, {}, stop=index) if index else x
    k = torch.randn(layer.output_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def output(weight):
        return (layer(inner, all_parameters(gradient) | {layer.weight: weight}) * k).sum()

    weight = all_parameters(gradient)[layer.weight]
    expected = layer.matrix(torch.func.grad(output)(weight))
    assert torch.allclose(layer.weight_gradient(inner, k), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["module", "opaque", "in forward", "zeros", "zeros, normalised"])
def test_ranks_are_those_of_the_model_without(name):
    plain, found = (rank_analysis(model, (1, 8, 8)) for model in (convnet(), built(name)))
    assert found.verdict == plain.verdict == "closed form"
    assert [(r.unknowns, r.rank, r.verdict) for r in found.layers] == [
        (r.unknowns, r.rank, r.verdict) for r in plain.layers
    ]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_ranks_of_repeated_pixels_are_those_of_the_dense_matrix(mode):
    torch.manual_seed(0)
    pad, conv = Padded(mode), nn.Conv2d(1, 2, 3, stride=2)
    found = rank_analysis(nn.Sequential(pad, conv), (1, 8, 8)).layers[0]
    k = torch.randn(2, 4, 4, dtype=torch.float64)

    def constraints(x):
        weight = conv.weight.detach().double().requires_grad_(True)
        z = F.conv2d(pad(x.reshape(1, 1, 8, 8)), weight, stride=2)
        return torch.cat([z.flatten(), torch.autograd.grad((z[0] * k).sum(), weight, create_graph=True)[0].flatten()])

    dense = torch.autograd.functional.jacobian(constraints, torch.randn(64, dtype=torch.float64))
    assert found.rank == int(torch.linalg.matrix_rank(dense))


@pytest.mark.parametrize("first", [Normalised, Checked, Flipped, Constants])
def test_batches_come_back_through_a_normalisation(digit_pictures, first):
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    x, y = digit_pictures.images[:3], digit_pictures.labels[:3]
    for attack in (RGAP(), SPEAR()):
        result = attack(observed(model, x, y, labels=y), generator=torch.Generator().manual_seed(0))
        assert result.converged
        assert min(psnr(found, true) for found, true in zip(result.inputs, x, strict=True)) > 90


def test_a_change_of_the_constants_is_seen(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = built("module")
    assert RGAP()(observed(model, x, y)).converged
    model[0].mean.fill_(0.5)
    result = RGAP()(observed(model, x, y))
    assert result.converged
    assert psnr(result.inputs, x) > 90


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.body = function, convnet()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.body(self.function(self, x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda self, x: x.clamp(0, 1), r"'clamp' \(clamp\).*does more than"),
        (lambda self, x: x * x, r"'mul' \(mul\).*does more than"),
        (lambda self, x: x - x.mean((2, 3), keepdim=True), r"'mean'|'sub'"),
        (lambda self, x: x - x.flip(0), r"flip|sub"),
        (lambda self, x: F.pad(x[:, :, 1:], (0, 0, 1, 0)), r"loses part of its input"),
        (lambda self, x: x * self.gain, r"'mul' \(mul\).*trained parameter"),
        (lambda self, x: x + torch.rand(1), r"'add' \(add\)|computes something else"),
    ],
)
def test_what_is_not_affine_is_refused_by_name(function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        rank_analysis(Called(function), (1, 8, 8))


def test_two_steps_in_a_row_are_one():
    chain = walk(LossGradient(nn.Sequential(Normalised(), Flipped(), convnet()), CE), (1, 8, 8))
    assert [type(step) for step in chain.steps].count(Rewire) == 1
