"""The papers' networks: their shapes and sizes are what the published numbers stand on."""

import pytest
import torch
from torch import nn

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.zoo.models import (
    ACTIVATIONS,
    NAMED,
    Normalised,
    activation_module,
    cnn6,
    convnet,
    digits_convnet,
    fcn,
    lenet,
    uniform_init_,
)


def sizes(model, input_shape):
    """For each layer with weights: (unknowns, outputs, weights), per example."""
    found = []

    def record(module, inputs, output):
        found.append((inputs[0].numel(), output.numel(), module.weight.numel()))

    hooks = [m.register_forward_hook(record) for m in model.modules() if hasattr(m, "weight")]
    model(torch.zeros(1, *input_shape))
    for hook in hooks:
        hook.remove()
    return found


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_cnn6():
    """Zhu & Blaschko 2021: the numbers of the rank analysis."""
    assert sizes(cnn6(), (3, 32, 32)) == [
        (3072, 3468, 576),
        (3468, 2916, 3888),
        (2916, 2916, 11664),
        (2916, 2916, 11664),
        (2916, 1600, 20736),
        (1600, 3200, 73728),
        (3200, 1, 3200),
    ]
    assert all(m.negative_slope == 0.2 for m in cnn6() if isinstance(m, nn.LeakyReLU))
    assert not any("bias" in n for n, _ in cnn6().named_parameters())


def test_cnn6_d():
    layers = sizes(cnn6(second_channels=20), (3, 32, 32))
    assert layers[1] == (3468, 1620, 2160)
    assert layers[2] == (1620, 2916, 6480)
    assert [layers[i] for i in (0, 3, 4, 5, 6)] == [sizes(cnn6(), (3, 32, 32))[i] for i in (0, 3, 4, 5, 6)]


def test_fcn3():
    model = NAMED["fcn3"][0]()
    assert sizes(model, (1, 28, 28)) == [(784, 1000, 784_000), (1000, 100, 100_000), (100, 1, 100)]
    assert count(model) == 884_100
    # Activations between the layers, none behind the last.
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear, nn.LeakyReLU, nn.Linear, nn.LeakyReLU, nn.Linear]
    assert count(fcn((784, 1000, 100, 1), bias=True)) == 884_100 + 1101


def test_lenet():
    """DLG's: 12 channels throughout, 28 -> 14 -> 7, so 588 features."""
    assert sizes(lenet(), (1, 28, 28)) == [
        (784, 2352, 300),
        (2352, 588, 3600),
        (588, 588, 3600),
        (588, 588, 3600),
        (588, 10, 5880),
    ]
    assert count(lenet()) == 300 + 3 * 3600 + 4 * 12 + 5880 + 10
    assert all(isinstance(lenet()[i], nn.Sigmoid) for i in (1, 3, 5, 7))


@pytest.mark.parametrize("image_size", [8, 13, 28, 32])
def test_lenet_of_other_sizes(image_size):
    model = lenet(in_channels=3, image_size=image_size, num_classes=7)
    assert model(torch.zeros(2, 3, image_size, image_size)).shape == (2, 7)


def test_digits_convnet():
    assert sizes(digits_convnet(), (1, 8, 8)) == [(64, 1024, 144), (1024, 512, 4608), (512, 10, 5120)]
    assert count(digits_convnet()) == 9930


@pytest.mark.parametrize("name", NAMED)
def test_named_models_take_their_input_shape(name):
    build, input_shape = NAMED[name]
    outputs = build()(torch.rand(2, *input_shape))
    assert outputs.shape[0] == 2
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("bound", [0.5, 0.1])
def test_uniform_init_fills_its_range(bound):
    torch.manual_seed(0)
    model = uniform_init_(lenet(), bound)
    values = torch.cat([p.flatten() for p in model.parameters()])
    assert values.abs().max() <= bound
    # Uniform: the extremes are reached, the variance is bound^2 / 3, and biases are drawn too.
    assert values.min() < -0.99 * bound
    assert values.max() > 0.99 * bound
    assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    assert all(p.abs().max() > 0.5 * bound for n, p in model.named_parameters() if n.endswith("bias"))
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_activations_by_name():
    x = torch.linspace(-2, 2, 9)
    for name in ACTIVATIONS:
        assert activation_module(name)(x).shape == x.shape
    assert torch.equal(activation_module("leaky_relu")(x), torch.where(x < 0, 0.2 * x, x))
    for build in (lenet, cnn6, digits_convnet, lambda activation: fcn((4, 3, 2), activation=activation)):
        with pytest.raises(InputError, match=r"`activation` must be one of \['elu', .*\], got 'relu6'"):
            build(activation="relu6")


def test_convnet_64():
    """Geiping et al. 2020 as their code builds it: 8 convolutions, 36 * width features."""
    model = convnet(64)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 128, 256, 256, 256, 256, 256]
    kinds = [type(m) for m in model]
    pools = [i for i, kind in enumerate(kinds) if kind is nn.MaxPool2d]
    assert [kinds[:i].count(nn.Conv2d) for i in pools] == [6, 8]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 8
    assert model[-1].in_features == 36 * 64
    weights = 9 * (3 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 4 * 256 * 256)
    channels = 64 + 2 * 128 + 5 * 256
    assert count(model) == weights + 3 * channels + 2304 * 10 + 10  # a bias, a scale and a shift per channel
    assert convnet(2, in_channels=1, image_size=28)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(InputError, match=r"`image_size` must be at least 9 .*, got 8"):
        convnet(image_size=8)


def test_normalised_inputs_change_no_gradient_and_keep_the_fast_path(batch):
    x, y = batch[0].double(), batch[1]
    torch.manual_seed(0)
    model = digits_convnet().double()
    whole = nn.Sequential(Normalised([0.375], [0.25]).double(), model)
    loss = nn.CrossEntropyLoss()
    inside = LossGradient(model, loss)((x - 0.375) / 0.25, y)
    outside = LossGradient(whole, loss)(x, y)
    assert set(outside) == {f"1.{n}" for n in inside}
    for name, gradient in inside.items():
        torch.testing.assert_close(outside[f"1.{name}"], gradient, rtol=1e-6, atol=1e-9)
    assert InputJacobian(LossGradient(whole, loss), x, y).way == "layer by layer"


def test_normalised_refuses_what_is_no_scale():
    with pytest.raises(InputError, match="`std` positive"):
        Normalised([0.5], [0.0])
    with pytest.raises(InputError, match="as long as each other"):
        Normalised([0.5, 0.5], [1.0])
