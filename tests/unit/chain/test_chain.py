"""Walking a model: steps against PyTorch, operators against dense matrices, refusals by their words."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian

from gradguard.chain import Affine, LayerSystem, all_parameters, few_threads, links, walk, walk_graph
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.linalg.cgls import cgls
from gradguard.zoo import models


def chain_of(model, input_shape, **options):
    return walk(LossGradient(model, nn.MSELoss(), dtype=torch.float64, **options), input_shape)


def as_matrix(operator):
    """An operator of one problem as its dense matrix."""
    return torch.stack([operator.matvec(e[None])[0] for e in torch.eye(operator.shape[2]).double()], dim=1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- what can be walked


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(torch.tanh(self.conv(x)))


class HandWritten(nn.Module):
    """Nested modules, calls and methods, a size read off the input, and a log-softmax at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, (0, 2), dilation=2)
        self.body = nn.Sequential(Inner(), nn.Sequential(nn.Identity(), Inner()))
        self.head = nn.Linear(4 * 6 * 8, 7)

    def forward(self, x):
        x = F.leaky_relu(F.softplus(self.first(x), 2.0), negative_slope=0.3)
        x = self.body(x).sigmoid()
        return F.log_softmax(self.head(x.view(x.size(0), -1)), dim=1)


class Flattened(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.head, self.how = nn.Conv2d(1, 2, 3), nn.Linear(72, 3), how

    def forward(self, x):
        return self.head(self.how(self.conv(x)))


def test_a_hand_written_forward_is_walked_in_order_with_paths():
    model = HandWritten().eval()
    chain = chain_of(model, (3, 16, 16))
    assert [(s.name, s.kind) for s in chain.steps] == [
        ("first", "Conv2d"),
        ("softplus", "Softplus"),
        ("leaky_relu", "LeakyReLU(0.3)"),
        ("body.0.conv", "Conv2d"),
        ("body.0.tanh", "Tanh"),
        ("body.1.1.conv", "Conv2d"),
        ("body.1.1.tanh_1", "Tanh"),
        ("sigmoid", "Sigmoid"),
        ("view", "Reshape"),
        ("head", "Linear"),
        ("log_softmax", "log_softmax"),
    ]
    x = random(3, 16, 16)
    expected = model.double()(x[None])[0]
    assert torch.allclose(chain(x, all_parameters(LossGradient(model, nn.NLLLoss()))), expected, atol=1e-12)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(start_dim=1),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(len(x) if isinstance(x, torch.Tensor) else -1, 72),
        nn.Flatten(),
    ],
    ids=["torch.flatten", "flatten", "view", "reshape", "module"],
)
def test_every_way_to_flatten(how):
    chain = chain_of(Flattened(how), (1, 8, 8))
    assert [s.kind for s in chain.steps] == ["Conv2d", "Reshape", "Linear"]
    assert chain.layers[-1].input_shape == (72,)


@pytest.mark.parametrize("name", sorted(n for n in models.NAMED if "224" not in n))
def test_named_models(name):
    build, shape = models.NAMED[name]
    model = build().double().eval()
    graph = walk_graph(LossGradient(model, nn.MSELoss()), shape)
    x, state = random(*shape), dict(model.state_dict())
    assert torch.allclose(graph(x, state), model(x[None])[0], atol=1e-12)
    if name.startswith(("vgg", "resnet", "convnet64")):
        with pytest.raises(UnsupportedModelError, match=r"MaxPool2d|residual|skip"):
            chain_of(model, shape)
    else:
        assert torch.allclose(chain_of(model, shape)(x, state), model(x[None])[0], atol=1e-12)


def test_a_graph_knows_what_every_path_goes_through():
    graph = walk_graph(LossGradient(nn.Sequential(nn.Conv2d(3, 4, 1), Residual()), nn.MSELoss()), (3, 8, 8))
    assert [s.kind for s in graph.steps] == ["Conv2d", "Conv2d", "Tanh", "Sum"]
    assert graph.sources == ((-1,), (0,), (1,), (0, 2))
    assert graph.consumers == ((1, 3), (2,), (3,), ())
    assert graph.dominators[-1] == {0, 3}


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)], ids=["affine", "plain"])
def test_batch_normalisation_in_eval_mode(module):
    module.running_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
    module.running_var.copy_(torch.tensor([0.3, 1.0, 2.0]))
    model = nn.Sequential(module, nn.Conv2d(3, 2, 3)).double().eval()
    gradient = LossGradient(model, nn.MSELoss())
    step, parameters = walk(gradient, (3, 5, 5)).steps[0], all_parameters(gradient)
    x, k = random(3, 5, 5).requires_grad_(), random(3, 5, 5, seed=1)
    y = module(x[None])[0]
    assert torch.allclose(step(x, parameters), y, atol=1e-12)
    assert torch.allclose(step.inverse(y, parameters), x, atol=1e-12)
    assert torch.allclose(step.backward(k, parameters), torch.autograd.grad((y * k).sum(), x)[0], atol=1e-12)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(3),
        lambda x: F.avg_pool2d(x, 2, stride=1),
        lambda x: F.adaptive_avg_pool2d(x, (2, 1)),
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=(-2, -1), keepdim=True),
    ],
    ids=["module", "padded", "adaptive", "call", "adaptive call", "mean", "torch.mean"],
)
def test_average_pooling_is_linear(pool):
    conv = nn.Conv2d(2, 3, 1)
    is_module = isinstance(pool, nn.Module)
    model = nn.Sequential(conv, pool) if is_module else model_of(lambda self, x: pool(self.a(x)), a=conv)
    step = chain_of(model, (2, 6, 6)).steps[1]
    x = random(3, 6, 6).requires_grad_()
    y = pool(x[None])[0]
    assert step.output_shape == y.shape
    assert torch.allclose(step(x), y, atol=1e-12)
    k = random(*y.shape, seed=1)
    assert torch.allclose(step.backward(k), torch.autograd.grad((y * k).sum(), x)[0], atol=1e-12)
    assert torch.allclose(step.channel() @ x[0].flatten(), y.flatten()[: y.numel() // 3], atol=1e-12)
    if step.disjoint:
        assert int(torch.linalg.matrix_rank(step.channel())) == y.numel() // 3
    with pytest.raises(UnsupportedModelError, match="averages, which loses"):
        chain_of(model, (2, 6, 6)).check_invertible(2)


def test_a_model_that_is_one_layer():
    chain = chain_of(nn.Linear(4, 3), (4,))
    assert [(s.name, s.weight) for s in chain.steps] == [("Linear", "weight")]


def test_parameters_come_by_name_frozen_ones_and_the_dtype_included():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    gradient = LossGradient(model, nn.MSELoss(), dtype=torch.float64)
    chain, parameters = walk(gradient, (4,)), all_parameters(gradient)
    assert {p.dtype for p in parameters.values()} == {torch.float64}
    assert [(layer.weight, layer.bias) for layer in chain.layers] == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert set(parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_dropout_is_left_out_when_it_does_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    assert len(chain_of(model, (4,), train_mode="eval").steps) == 2
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Dropout\) is in training mode"):
        chain_of(model, (4,))
    assert len(chain_of(model.eval(), (4,)).steps) == 2


# ---------------------------------------------------------------------- layers against dense matrices

LAYERS = {
    "linear": (nn.Linear(5, 8), (5,)),
    "plain": (nn.Conv2d(2, 3, 3), (2, 6, 5)),
    "stride and padding": (nn.Conv2d(3, 4, 4, stride=2, padding=2, bias=False), (3, 7, 7)),
    "dilation": (nn.Conv2d(2, 3, (3, 2), dilation=(2, 1), padding=(1, 2), stride=(1, 2)), (2, 7, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3), (3, 5, 5)),
    "same, odd": (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5)),
    "same, even": (nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(1, 3)), (2, 6, 7)),
    "valid": (nn.Conv2d(2, 3, 2, padding="valid", stride=3), (2, 7, 7)),
    "more filters than positions": (nn.Conv2d(4, 16, 3, groups=2, stride=2, padding=1), (4, 3, 4)),
}


def case(name):
    """The module, its step, its parameters, an input and a `k` in general position."""
    module, shape = LAYERS[name]
    torch.manual_seed(0)
    module.reset_parameters()
    module = module.double()
    layer = chain_of(module, shape).layers[0]
    assert isinstance(layer, Affine)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    return module, layer, parameters, random(*shape), random(*layer.output_shape, seed=1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
class TestLayer:
    def test_value(self, name):
        module, layer, parameters, x, _ = case(name)
        assert torch.allclose(layer(x, parameters), module(x[None])[0], atol=1e-12)

    def test_weight_gradient_and_backward_are_autograd_s(self, name):
        module, layer, parameters, x, k = case(name)
        x.requires_grad_(True)
        weight_grad, x_grad = torch.autograd.grad((module(x[None])[0] * k).sum(), [module.weight, x])
        assert torch.allclose(layer.weight_gradient(x, k), layer.matrix(weight_grad), atol=1e-12)
        assert torch.allclose(layer.backward(k, parameters), x_grad, atol=1e-12)

    def test_unpatches_is_the_transpose_of_patches(self, name):
        _, layer, _, x, _ = case(name)
        patches = layer.patches(x)
        u = random(*patches.shape, seed=2)
        assert torch.allclose((patches * u).sum(), (x * layer.unpatches(u)).sum(), atol=1e-12)

    def test_pixels_say_which_element_each_tap_meets(self, name):
        _, layer, _, x, _ = case(name)
        pixels = layer.pixels()
        channels = layer.input_shape[0]
        flat = torch.cat([x.reshape(channels, -1), torch.zeros(channels, 1, dtype=x.dtype)], dim=1)  # -1: the padding
        assert torch.equal(flat[:, pixels].reshape(layer.patches(x).shape), layer.patches(x))

    def test_system_is_the_dense_one_up_to_the_scale_of_its_rows(self, name):
        module, layer, parameters, x, k = case(name)

        def constraints(x):
            z = layer(x, parameters) - layer.offset(parameters)
            weight = module.weight.detach().requires_grad_(True)
            other = torch.func.functional_call(module, {"weight": weight}, (x[None],))[0]
            (gradient,) = torch.autograd.grad((other * k).sum(), weight, create_graph=True)
            return torch.cat([z.flatten(), gradient.flatten()])

        dense = jacobian(constraints, x).reshape(-1, layer.unknowns)
        system = LayerSystem.of(layer, parameters["weight"], k, k, layer.weight_gradient(x, k))
        found = as_matrix(system.equations)
        rows_of = [parameters["weight"].flatten(1).norm(dim=1), k.reshape(len(k), -1).norm(dim=1)]
        repeats = [layer.outputs // layer.filters, layer.taps]
        scale = torch.cat([n.repeat_interleave(r) for n, r in zip(rows_of, repeats, strict=True)])
        assert torch.allclose(found * scale[:, None], dense, atol=1e-10)
        u = random(1, len(dense), seed=3)
        assert torch.allclose(system.equations.rmatvec(u)[0], found.mT @ u[0], atol=1e-10)

    def test_fewer_rows_are_the_same_least_squares_problem(self, name):
        _, layer, parameters, x, k = case(name)
        z, sent = random(*layer.output_shape, seed=4), random(*parameters["weight"].shape, seed=5)
        system = LayerSystem.of(layer, parameters["weight"], k, z, sent)
        every, few = as_matrix(system.equations), as_matrix(system.operator)
        positions = layer.outputs // layer.filters
        fewer = layer.taps * (layer.filters - layer.groups * min(layer.filters // layer.groups, positions))
        assert len(every) - len(few) == fewer
        assert torch.allclose(few.mT @ few, every.mT @ every, atol=1e-10)
        assert torch.allclose(few.mT @ system.target[0], every.mT @ system.values[0], atol=1e-10)
        assert torch.allclose(system.misfit(x)[0], system.values[0] - every @ x.flatten(), atol=1e-10)
        lengths = every.norm(dim=0)
        assert torch.allclose(system.column_lengths[0], torch.where(lengths > 0, lengths, 1.0), atol=1e-10)

    def test_solving_the_system_gives_the_input_or_its_determined_part(self, name):
        _, layer, parameters, x, k = case(name)
        z = layer(x, parameters) - layer.offset(parameters)
        system = LayerSystem.of(layer, parameters["weight"], k, z, layer.weight_gradient(x, k))
        found = cgls(system.operator, system.target)
        dense = as_matrix(system.operator)
        assert torch.allclose(found.solution[0], torch.linalg.pinv(dense) @ system.target[0], atol=1e-9)
        rank = int(torch.linalg.matrix_rank(dense))
        assert rank <= layer.rank_bound()
        if rank == layer.unknowns:
            assert torch.allclose(found.solution[0], x.flatten(), atol=1e-9)


@pytest.mark.parametrize("filters", [1, 2, 3])
def test_rank_bound_is_reached_where_every_weight_meets_every_pixel_alike(filters):
    """No padding, so nothing is structurally zero: the count of the overlap is exact."""
    module = nn.Conv2d(3, filters, 2, bias=False).double()
    layer = chain_of(module, (3, 5, 5)).layers[0]
    k = random(*layer.output_shape)
    system = LayerSystem.of(layer, module.weight.detach(), k, k, module.weight.detach())
    dense = as_matrix(system.operator)
    assert int(torch.linalg.matrix_rank(dense)) == layer.rank_bound()
    assert layer.rank_bound() == min(75, 16 * filters + 12 * filters - filters**2)


def test_small_layers_are_solved_on_one_thread_and_the_number_is_put_back(monkeypatch):
    layers, before = chain_of(models.digits_convnet(), (1, 8, 8)).layers, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyError), few_threads(layers):
            assert torch.get_num_threads() == 1
            raise KeyError  # the number is put back after an error too
        assert torch.get_num_threads() == 2
        monkeypatch.setattr("gradguard.chain.system._SMALL", 0)
        with few_threads(layers):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------- activations


def logistic(z):
    return 1 / (1 + torch.exp(-z))


#: name: the step, its derivative by hand
ACTIVATIONS = {
    "leaky_relu": (links.leaky_relu(negative_slope=0.2), lambda z: torch.where(z > 0, 1.0, 0.2).double()),
    "sigmoid": (links.sigmoid(), lambda z: logistic(z) * (1 - logistic(z))),
    "tanh": (links.tanh(), lambda z: 1 - torch.tanh(z) ** 2),
    "softplus": (links.softplus(), logistic),
    "softplus, beta 3": (
        links.softplus(beta=3.0, threshold=5.0),
        lambda z: torch.where(3 * z > 5, 1.0, logistic(3 * z)),
    ),
    "elu": (links.elu(alpha=0.7), lambda z: torch.where(z > 0, 1.0, 0.7 * torch.exp(z))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_inverse_and_derivative(name):
    step, derivative = ACTIVATIONS[name]
    z = torch.linspace(-8, 8, 400, dtype=torch.float64)
    assert torch.allclose(step.inverse(step(z)), z, rtol=1e-8, atol=1e-8)
    expected = derivative(z)
    assert torch.allclose(step.derivative(z), expected.to(z.dtype), rtol=1e-6, atol=1e-12)
    assert not step.outside(step(z)).any()


def test_a_value_outside_the_interval_counts_as_the_nearest_inside():
    v = torch.tensor([-0.5, 0.5, 1.5], dtype=torch.float64)
    step = links.sigmoid()
    assert step.outside(v).tolist() == [True, False, True]
    z = step.inverse(v)
    assert torch.isfinite(z).all()
    assert z[0] < -30
    assert z[1] == 0
    assert z[2] > 30


def test_what_is_not_one_to_one_is_walked_and_refused_by_name_where_its_inverse_is_needed():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(72, 2))
    chain = chain_of(model, (1, 8, 8))
    chain.check_invertible(1)
    with pytest.raises(UnsupportedModelError, match=r"'1.0' \(ReLU\) is not one-to-one.*LeakyReLU"):
        chain.check_invertible(4)


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(0.0), nn.LeakyReLU(-0.5), nn.ELU(-1.0), nn.GELU(), nn.SiLU(), nn.Mish(), nn.ReLU6()],
    ids=repr,
)
def test_activations_without_an_inverse(module):
    model = nn.Sequential(nn.Linear(3, 3), module, nn.Linear(3, 1))
    assert not chain_of(model, (3,)).steps[1].invertible


# ---------------------------------------------------------------------- refusals


def model_of(forward, **modules):
    """A module with this `forward(self, x)`."""
    kind = type("Custom", (nn.Module,), {"forward": forward})
    model = kind()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def hooked():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


LINEAR = nn.Linear(4, 4)
REFUSED = {
    "residual": (nn.Sequential(nn.Conv2d(3, 4, 3), Residual()), (3, 8, 8), r"'1\.add' \(add\).*residual"),
    "batch norm": (
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
        (3, 8, 8),
        r"'0\.1' \(BatchNorm2d\).*statistics of the batch.*model\.eval",
    ),
    "batch norm without statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        (3, 8, 8),
        r"'1' \(BatchNorm2d\).*running statistics",
    ),
    "max pool": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), (3, 8, 8), r"'1' \(MaxPool2d\).*stride"),
    "mean": (model_of(lambda self, x: self.a(x).mean(1), a=LINEAR), (4,), r"'mean' \(mean\).*averages over"),
    "layer norm": (nn.Sequential(LINEAR, nn.LayerNorm(4)), (4,), r"'1' \(LayerNorm\) normalises"),
    "conv1d": (nn.Sequential(nn.Conv1d(2, 2, 3)), (2, 8), r"'0' \(Conv1d\).*Use nn\.Conv2d"),
    "padding mode": (
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        (2, 8, 8),
        r"'0'.*'reflect'",
    ),
    "shared layer": (shared(), (4,), r"'0'.*'0\.weight' a second time"),
    "hook": (hooked(), (4,), "Sequential computes something else.*forward hook"),
    "parametrization": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        (4,),
        r"'0' \(ParametrizedLinear\) is a subclass of Linear",
    ),
    "functional layer": (
        model_of(lambda self, x: F.linear(x, self.a.weight), a=LINEAR),
        (4,),
        r"'linear' \(linear\) in the model's `forward` uses a weight outside",
    ),
    "scaling": (model_of(lambda self, x: 2 * self.a(x), a=LINEAR), (4,), r"'mul' \(mul\)"),
    "branch": (model_of(lambda self, x: torch.cat([self.a(x), x], 1), a=LINEAR), (4,), r"'cat' \(cat\).*joins"),
    "skipped layer": (model_of(lambda self, x: (self.a(x), self.b(x))[1], a=LINEAR, b=nn.Tanh()), (4,), "no Linear or"),
    "two outputs": (model_of(lambda self, x: (self.a(x), x), a=LINEAR), (4,), "returns something else"),
    "two inputs": (model_of(lambda self, x, mask: self.a(x), a=LINEAR), (4,), r"more than one input \('mask'\)"),
    "control flow": (model_of(lambda self, x: self.a(x) if x.sum() > 0 else x, a=LINEAR), (4,), "cannot be traced"),
    "batch of one": (model_of(lambda self, x: self.a(x.view(1, -1)), a=LINEAR), (4,), r"'view'.*Keep the first dim"),
    "dropout call": (model_of(lambda self, x: F.dropout(self.a(x), 0.5), a=LINEAR), (4,), r"'dropout'.*model\.eval"),
    "early softmax": (
        nn.Sequential(LINEAR, nn.Softmax(1), nn.Linear(4, 2)),
        (4,),
        r"'1' \(Softmax\) comes before .*'2'",
    ),
    "softmax over the batch": (nn.Sequential(LINEAR, nn.Softmax(0)), (4,), r"'1' \(Softmax\).*dim=0"),
    "no layer": (model_of(lambda self, x: torch.tanh(x), a=LINEAR), (4,), "has no Linear or Conv2d"),
}


def test_a_change_since_the_last_walk_is_seen():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32, 2)).double()
    gradient, x = LossGradient(model, nn.MSELoss()), random(1, 6, 6)
    first = walk(gradient, (1, 6, 6))
    assert walk(gradient, (1, 6, 6)) is first
    model[1].negative_slope = 0.7
    second = walk(gradient, (1, 6, 6))
    assert torch.allclose(second(x, dict(model.state_dict())), model(x[None])[0], atol=1e-12)
    model[3].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        walk(gradient, (1, 6, 6))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_place_and_the_reason(name):
    model, shape, message = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        chain_of(model, shape)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (models.lenet(), (3, 28, 28), r"'0' \(Conv2d\) takes pictures of 1 channels.*\(3, 28, 28\)"),
        (models.lenet(), (1, 32, 32), r"'9' \(Linear\) takes a vector of 588 features.*\(768,\)"),
        (nn.Linear(4, 2), (2, 4), r"'Linear' \(Linear\) takes a vector of 4 features.*flatten"),
        (nn.Conv2d(1, 1, 5), (1, 4, 8), r"kernel of layer 'Conv2d'.*larger than its input \(1, 4, 8\)"),
        (nn.Linear(4, 2), (), r"`input_shape` must be the shape of one example"),
    ],
)
def test_an_input_shape_that_does_not_fit(model, shape, message):
    with pytest.raises(InputError, match=message):
        chain_of(model, shape)


# ---------------------------------------------------------------------- the other side


@pytest.mark.parametrize("build", [links.silu, links.gelu, links.mish])
def test_both_arguments_of_an_activation_with_a_turn(build):
    activation = build()
    right = torch.linspace(activation.turn + 1e-3, 30.0, 500, dtype=torch.float64)
    assert torch.allclose(activation.inverse(activation(right)), right, atol=1e-9)
    left = torch.linspace(activation.turn - 6.0, activation.turn - 1e-3, 500, dtype=torch.float64)
    other, slope, distance = activation.other(activation.inverse(activation(left)))
    assert torch.allclose(other, left, atol=1e-6)
    assert torch.allclose(slope, activation.derivative(left), atol=1e-6)
    assert distance.eq(0).all()
    _, _, distance = activation.other(torch.tensor([0.5, 3.0], dtype=torch.float64))
    assert distance.isinf().all()
    assert activation.partly_invertible
    assert not activation.invertible


def test_across_a_kink_only_the_derivative_is_another():
    z = torch.tensor([-0.5, 0.25], dtype=torch.float64)
    other, slope, distance = links.leaky_relu(negative_slope=0.2).other(z)
    assert torch.equal(other, z)
    assert slope.tolist() == pytest.approx([1.0, 0.2])
    assert distance.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_response_of_a_system_is_what_its_misfit_falls_by(groups):
    torch.manual_seed(0)
    module = nn.Conv2d(2, 4, 3, padding=1, groups=groups, bias=False).double()
    layer = chain_of(module, (2, 5, 5)).steps[0]
    weight, (x, guess) = module.weight.detach(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    z, k = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    units = torch.tensor([3, 60, 61])
    dz, dk = torch.randn(2, 3, dtype=torch.float64)
    moved_z, moved_k = (v.flatten().index_add(0, units, d).reshape(4, 5, 5) for v, d in ((z, dz), (k, dk)))
    sent = layer.weight_gradient(x, k)
    system = LayerSystem.of(layer, weight, k, z, sent)
    response = system.response(guess, units, dz, dk)
    # The moved system at the first one's scales, written out.
    w_scale, k_scale = system.scales
    rows = layer.rows(moved_z - (layer.matrix(weight) @ layer.patches(guess)).reshape(4, 5, 5)) * w_scale
    columns = (sent - layer.weight_gradient(guess, moved_k)) * k_scale
    moved = torch.cat([rows.flatten(), columns.flatten()])[None]
    fall = response.matvec(torch.ones(1, 3, dtype=torch.float64))
    assert torch.allclose(system.misfit(guess) - moved, fall, atol=1e-12)
    t, u = torch.randn(1, 3, dtype=torch.float64), torch.randn_like(fall)
    assert torch.allclose((response.matvec(t) * u).sum(), (t * response.rmatvec(u)).sum())
