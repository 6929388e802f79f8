"""`LocalTraining` is the update that a loop with `torch.optim.SGD` makes, in float64."""

import copy

import pytest
import torch
from torch import nn

import gradguard as gg


def updated(model, loss_fn, inputs, targets, *, steps, size, regulariser=None, **options):
    """The parameters before and after a real training loop."""
    trained = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in trained.named_parameters()}
    optimiser = torch.optim.SGD(trained.parameters(), **options)
    parts = list(zip(inputs.split(size), targets.split(size), strict=True))
    for step in range(steps):
        x, y = parts[step % len(parts)]
        optimiser.zero_grad()
        loss = loss_fn(trained(x), y)
        if regulariser is not None:
            loss = loss + regulariser(dict(trained.named_parameters()))
        loss.backward()
        optimiser.step()
    return before, {n: p.detach() for n, p in trained.named_parameters()}


@pytest.mark.parametrize("proximal", [0.0, 0.3])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.5, "weight_decay": 0.2}]
)
@pytest.mark.parametrize(("steps", "size"), [(1, 4), (5, 3), (2, 1)])
def test_it_is_what_torch_does(convnet, cross_entropy, batch, steps, size, options, proximal):
    start = {n: p.detach().clone() for n, p in convnet.named_parameters()}

    def regulariser(parameters):
        return proximal / 2 * sum((p - start[n]).square().sum() for n, p in parameters.items())

    before, after = updated(
        convnet, cross_entropy, *batch, steps=steps, size=size, regulariser=regulariser, lr=0.05, **options
    )
    training = gg.LocalTraining(
        steps=steps, learning_rate=0.05, batch_size=size, regulariser=regulariser if proximal else None, **options
    )
    mean = training.mean_gradient(gg.LossGradient(convnet, cross_entropy), *batch)
    for name in before:
        torch.testing.assert_close(0.05 * steps * mean[name], before[name] - after[name], rtol=1e-9, atol=1e-12)
    assert training.examples_used(4) == min(4, steps * size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.1}, "`momentum` must not be negative"),
        ({"weight_decay": float("nan")}, "`weight_decay` must not be negative"),
        ({"optimiser": "adam"}, '`optimiser` must be "sgd"'),
        ({"regulariser": 0.1}, "`regulariser` must be a function"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(gg.InputError, match=message):
        gg.LocalTraining(steps=1, learning_rate=0.1, **options)


@pytest.mark.parametrize("regulariser", [lambda p: 0.5, lambda p: p["0.bias"], lambda p: p["0.bias"].sum() / 0])
def test_a_regulariser_that_is_no_scalar(convnet, cross_entropy, batch, regulariser):
    training = gg.LocalTraining(steps=1, learning_rate=0.1, regulariser=regulariser)
    with pytest.raises(gg.InputError, match="finite scalar tensor"):
        training.mean_gradient(gg.LossGradient(convnet, cross_entropy), *batch)


def test_the_regulariser_is_differentiated_through(cross_entropy):
    """The derivative of the mean gradient by the input, which matching attacks take, against finite differences."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.rand(2, 3).double(), torch.tensor([0, 1])
    training = gg.LocalTraining(
        steps=3, learning_rate=0.5, momentum=0.5, regulariser=lambda p: p["weight"].pow(4).sum()
    )
    function = gg.LossGradient(model, cross_entropy)

    def first(inputs):
        return training(function.loss, function.parameters(), inputs, y)["weight"]

    assert torch.autograd.gradcheck(first, x.requires_grad_(True))
