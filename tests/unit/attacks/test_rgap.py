"""R-GAP on real pictures: what comes back, in dB, and what is said when nothing can."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from gradguard.attacks import RGAP, Observation
from gradguard.attacks._closed_form.rgap_layer import LayerSolver, natural_damping
from gradguard.chain import walk
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.zoo import models
from gradguard.zoo.pictures import photos

BCE = nn.BCEWithLogitsLoss()
CE = nn.CrossEntropyLoss()


def psnr(found, true):
    """dB in [0, 1] pixel space."""
    return -10 * math.log10(max(float((found - true).double().square().mean()), 1e-40))


def observe(model, loss, x, y, *, dtype=torch.float64, labels=True, noise=0.0, **options):
    """What an attacker sees of the gradient of `x`, computed in `dtype`; `noise`: relative to its norm."""
    sent = LossGradient(model, loss, dtype=dtype)(x, y)
    if noise:
        generator = torch.Generator().manual_seed(0)
        drawn = {n: torch.randn(g.shape, generator=generator, dtype=torch.float64) for n, g in sent.items()}
        ratio = (
            torch.stack([g.norm() for g in sent.values()]).norm()
            / torch.stack([d.norm() for d in drawn.values()]).norm()
        )
        sent = {n: g + noise * ratio * drawn[n] for n, g in sent.items()}
    return Observation(
        loss_gradient=LossGradient(model, loss),
        sent=sent,
        input_shape=x.shape[1:],
        labels=y if labels else None,
        **options,
    )


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def label(value):
    return torch.tensor([[value]])


# ---------------------------------------------------------------------- the paper's models


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_cnn6_gives_a_photograph_away(index, dtype):
    x = photos(32).images[index : index + 1]
    model = seeded(models.cnn6, index)
    result = RGAP()(observe(model, BCE, x, label(1.0), dtype=dtype, labels=False))
    assert psnr(result.inputs, x) > (120 if dtype == torch.float64 else 60)
    assert result.labels.item() == 1
    assert result.converged
    assert result.matching_loss < 1e-10
    rows = result.details["layers"]
    assert [row["layer"] for row in rows] == ["10", "8", "6", "4", "2", "0"]
    assert all(row["rank_bound"] == row["unknowns"] and row["solved"] for row in rows)
    assert result.details["residual"] == max(row["residual"] for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_cnn6_on_cifar(real_pictures, seed):
    pictures = real_pictures("cifar10_2000")
    x, y = pictures.images[300 * seed : 300 * seed + 1], label(float(seed % 2))
    result = RGAP()(observe(seeded(models.cnn6, seed), BCE, x, y))
    assert psnr(result.inputs, x) > 120


def test_fcn3_on_mnist(real_pictures):
    x = real_pictures("mnist_2000").images[:1]
    result = RGAP()(observe(seeded(lambda: models.fcn((784, 1000, 100, 1))), BCE, x, label(1.0), labels=False))
    assert psnr(result.inputs, x) > 120
    assert result.labels.item() == 1


def test_cnn6_d_is_not_determined_and_the_attack_says_so():
    x = photos(32).images[:1]
    result = RGAP()(observe(seeded(lambda: models.cnn6(second_channels=20)), BCE, x, label(1.0)))
    assert psnr(result.inputs, x) < 30
    assert not result.converged
    assert result.matching_loss > 1e-3
    short = {row["layer"]: row for row in result.details["layers"]}
    assert short["2"]["rank_bound"] < short["2"]["unknowns"]
    assert short["2"]["residual"] < 1e-8  # a solution of least norm fits its own constraints,
    assert short["0"]["residual"] > 1e-2  # and the layer below finds out


# ---------------------------------------------------------------------- other heads, losses and activations


@pytest.mark.parametrize("activation", ["tanh", "softplus", "sigmoid", "leaky_relu", "elu"])
@pytest.mark.parametrize("labels", [True, False], ids=["label known", "label unknown"])
def test_a_softmax_head_with_a_bias(digit_pictures, activation, labels):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = seeded(lambda: models.digits_convnet(activation=activation))
    result = RGAP()(observe(model, CE, x, y, labels=labels))
    assert psnr(result.inputs, x) > 120
    assert torch.equal(result.labels, y)
    assert result.details["head"] == "bias"


def test_lenet_with_sigmoids():
    x = photos(28).images[:1].mean(1, keepdim=True)
    result = RGAP()(observe(seeded(models.lenet), CE, x, torch.tensor([7]), labels=False))
    assert psnr(result.inputs, x) > 120
    assert result.labels.item() == 7


@pytest.mark.parametrize(
    ("classes", "loss", "y", "head"),
    [
        (1, BCE, label(0.0), "logistic"),
        (1, nn.SoftMarginLoss(), label(-1.0), "logistic"),
        (2, CE, torch.tensor([1]), "softmax"),
        (10, CE, torch.tensor([4]), "softmax"),
        (1, nn.MSELoss(), label(1.0), "squared"),
        (10, nn.MSELoss(), torch.eye(10)[[4]], "squared"),
        (10, nn.MSELoss(reduction="sum"), torch.eye(10)[[4]], "squared"),
    ],
    ids=["BCE", "SoftMargin", "2 classes", "10 classes", "MSE", "MSE of 10", "MSE, sum"],
)
@pytest.mark.parametrize("labels", [True, False], ids=["label known", "label unknown"])
def test_heads_without_a_bias(digit_pictures, classes, loss, y, head, labels):
    x = digit_pictures.images[5:6]
    model = seeded(lambda: models.fcn((64, 80, 30, classes)))
    result = RGAP()(observe(model, loss, x, y, labels=labels))
    assert psnr(result.inputs, x) > 120
    assert torch.equal(result.labels, y)
    assert result.details["head"] == head


@pytest.mark.parametrize(
    ("tail", "loss", "y", "classes"),
    [(nn.Sigmoid(), nn.BCELoss(), label(1.0), 1), (nn.LogSoftmax(1), nn.NLLLoss(), torch.tensor([2]), 4)],
    ids=["Sigmoid and BCELoss", "LogSoftmax and NLLLoss"],
)
def test_a_last_activation_is_part_of_the_loss(digit_pictures, tail, loss, y, classes):
    x = digit_pictures.images[5:6]
    model = seeded(lambda: nn.Sequential(models.fcn((64, 80, classes), activation="tanh"), tail))
    result = RGAP()(observe(model, loss, x, y, labels=False))
    assert psnr(result.inputs, x) > 120
    assert torch.equal(result.labels, y)


def test_a_linear_layer_with_a_bias_is_enough_whatever_lies_above(digit_pictures):
    """The recursion starts there: neither the ReLU nor the unknown loss matters."""
    x, y = digit_pictures.images[5:6], torch.tensor([[0.3, -1.0, 2.0]])
    model = seeded(lambda: models.fcn((64, 20, 3), activation="relu", bias=True))
    result = RGAP()(observe(model, nn.MSELoss(), x, y))
    assert psnr(result.inputs, x) > 120
    assert result.details["start"] == "1"
    unlabelled = RGAP()(observe(model, nn.MSELoss(), x, y, labels=False))
    assert torch.equal(unlabelled.inputs, result.inputs)
    assert unlabelled.labels is None
    assert math.isnan(unlabelled.matching_loss)


def test_a_frozen_layer_has_weight_constraints_only(digit_pictures):
    x, y = digit_pictures.images[5:6], digit_pictures.labels[5:6]
    model = seeded(models.digits_convnet)
    model[0].weight.requires_grad_(False)  # 1,024 outputs of 64 pixels are enough
    result = RGAP()(observe(model, CE, x, y))
    assert psnr(result.inputs, x) > 120
    assert result.details["layers"][-1]["gradient_constraints"] == 0


def test_twins_are_told_apart_by_the_value_range_only(digit_pictures):
    """Without biases LeakyReLU makes the model homogeneous: both margins' pictures have the same gradient."""
    x, y = digit_pictures.images[5:6], label(1.0)
    model = seeded(lambda: models.fcn((64, 80, 1)))
    with torch.no_grad():
        z = model(x).item()
        model[-1].weight.mul_(2.0 / z)  # a margin above the minimum: the twin is the smaller picture
        assert model(x).item() == pytest.approx(2.0, rel=1e-3)
    result = RGAP()(observe(model, BCE, x, y))
    assert result.details["twins"] == 1
    assert psnr(result.inputs, x) > 120
    smaller = RGAP()(observe(model, BCE, x, y, value_range=None))
    assert smaller.details["twins"] == 1
    assert smaller.matching_loss < 1e-10
    ratio = smaller.inputs / x.double()
    assert ratio[x > 0].std() < 1e-6  # the same picture, darker
    assert float(ratio[x > 0].mean()) == pytest.approx(0.3, abs=0.15)


# ---------------------------------------------------------------------- ReLU, batch normalisation, pooling


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("index", range(3))
def test_relu_hides_half_of_the_outputs_and_the_rest_is_enough(digit_pictures, activation, dtype, index):
    x, y = digit_pictures.images[index : index + 1], digit_pictures.labels[index : index + 1]
    model = seeded(lambda: models.digits_convnet(activation="relu"), index)
    if activation == "relu6":
        model[1] = model[3] = nn.ReLU6()
        with torch.no_grad():
            model[0].weight.mul_(20)  # the upper end is reached too
            assert (model[0](x) > 6).any()
    result = RGAP()(observe(model, CE, x, y, dtype=dtype, labels=False))
    assert psnr(result.inputs, x) > (120 if dtype == torch.float64 else 60)
    assert result.converged
    assert (result.details["short"], result.details["note"]) == ([], "")
    rows = result.details["layers"]
    with torch.no_grad():
        values = [model[:2](x), model[:4](x)]
    zero = [int(((v == 0) | (v == 6)).sum()) for v in values]
    assert [row["hidden"] for row in rows] == zero[::-1]
    assert [row["weight_constraints"] + row["hidden"] for row in rows] == [512, 1024]


def test_a_layer_that_relu_leaves_short_is_named(digit_pictures):
    """1 x 1 filters: 3 x 64 outputs would determine 64 pixels, but no output is positive where the picture is dark."""
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-0.5)
    result = RGAP()(observe(model, CE, x, y))
    bright = int((x > 0.5).sum())
    row = result.details["layers"][0]
    assert row["weight_constraints"] == 3 * bright
    assert torch.allclose(result.inputs[x > 0.5], x[x > 0.5].double(), atol=1e-9)  # what is not hidden comes back
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-0.5)
    result = RGAP()(observe(model, CE, x, y))
    assert result.details["short"] == ["0"]
    assert f"'0' (at least {64 - bright})" in result.details["note"]
    assert not result.converged


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_batch_normalisation_in_eval_mode_is_a_step(digit_pictures, frozen):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = seeded(models.digits_convnet)
    norms = nn.BatchNorm2d(16), nn.BatchNorm2d(32)
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            norm.weight.uniform_(-2, 2)
            norm.bias.normal_()
        norm.requires_grad_(not frozen)
    model = nn.Sequential(model[0], norms[0], *model[1:3], nn.Identity(), norms[1], *model[3:]).eval()
    result = RGAP()(observe(model, CE, x, y, labels=False))
    assert psnr(result.inputs, x) > 120
    assert result.converged
    assert torch.equal(result.labels, y)


def test_average_pooling_leaves_its_input_short_and_the_attack_says_so(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    conv = nn.Conv2d(1, 16, 3, padding=1)
    model = seeded(lambda: nn.Sequential(conv, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)))
    result = RGAP()(observe(model, CE, x, y))
    rows = {row["layer"]: row for row in result.details["layers"]}
    assert (rows["2"]["unknowns"], rows["2"]["rank_bound"]) == (1024, 256)
    assert rows["2"]["residual"] < 1e-10
    assert result.details["short"] == ["2"]
    assert "'2' (at least 768)" in result.details["note"]
    assert not result.converged


# ---------------------------------------------------------------------- residual blocks


class Block(nn.Module):
    """A residual block with the activations first, as in He et al. 2016 (arXiv 1603.05027)."""

    def __init__(self, channels, out=None, stride=1, norm=True):
        super().__init__()
        out = out or channels
        self.branch = nn.Sequential(
            *([nn.BatchNorm2d(channels)] if norm else []),
            nn.ReLU(),
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
            *([nn.BatchNorm2d(out)] if norm else []),
        )
        same = out == channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out, 3, stride, 1, bias=False)

    def forward(self, x):
        return self.branch(x) + self.skip(x)


def with_statistics(model):
    """In eval mode, as if its batch normalisations had been trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


RESIDUAL = {
    "identity": lambda: nn.Sequential(Block(12), Block(12), nn.Flatten(), nn.Linear(12 * 64, 10)),
    "projection": lambda: nn.Sequential(Block(12), nn.Tanh(), Block(12, 16, 2), nn.Flatten(), nn.Linear(256, 10)),
    "no normalisation": lambda: nn.Sequential(Block(12, norm=False), nn.ELU(), nn.Flatten(), nn.Linear(12 * 64, 10)),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_blocks_whose_last_layers_gradient_gives_its_input(name, digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    stem = nn.Conv2d(1, 12, 3, padding=1)
    model = with_statistics(seeded(lambda: nn.Sequential(stem, *RESIDUAL[name]())))
    for dtype, least in ((torch.float64, 120), (torch.float32, 60)):
        result = RGAP()(observe(model, CE, x, y, labels=False, dtype=dtype))
        assert result.converged
        assert psnr(result.inputs, x) > least
        assert torch.equal(result.labels, y)
    assert {row["hidden"] for row in result.details["layers"] if "branch" in row["layer"]} >= {12 * 64}


def test_residual_blocks_of_linear_layers_without_biases(digit_pictures):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(70, 30, bias=False), nn.GELU(), nn.Linear(30, 70, bias=False))

        def forward(self, x):
            return x + self.branch(x)

    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    first, head = nn.Linear(64, 70, bias=False), nn.Linear(70, 10, bias=False)
    model = seeded(lambda: nn.Sequential(nn.Flatten(), first, Added(), nn.LeakyReLU(0.2), Added(), head))
    result = RGAP()(observe(model, CE, x, y))
    assert result.converged
    assert psnr(result.inputs, x) > 120


def test_a_branch_that_too_few_gradients_come_from_is_short(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    stem, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)
    model = with_statistics(seeded(lambda: nn.Sequential(stem, Block(4), nn.Flatten(), head)))
    result = RGAP()(observe(model, CE, x, y))
    assert result.details["short"] == ["1.branch.4"]
    row = result.details["layers"][0]
    assert (row["unknowns"], row["rank_bound"]) == (256, 4 * 36)  # 4 x 9 equations for the 64 pixels of each channel
    assert not result.converged


def test_noise_on_residual_blocks_is_damped(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    stem = nn.Conv2d(1, 12, 3, padding=1)
    model = with_statistics(seeded(lambda: nn.Sequential(stem, *RESIDUAL["identity"]())))
    found = RGAP()(observe(model, CE, x, y, noise=1e-2))
    bare = RGAP(damping=0.0)(observe(model, CE, x, y, noise=1e-2))
    assert psnr(found.inputs, x) > psnr(bare.inputs, x) - 1
    assert any(row["damping"] > 0 for row in found.details["layers"])


class Doubled(nn.Module):
    """Its first value goes into two sums."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        a = self.a(x)
        return x + a + self.b(a)


class Late(nn.Module):
    """A branch that ends in an activation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ([Block(4), nn.ReLU()], r"'2' \(ReLU\) after the sum '1\.add' hides part"),
        ([Late()], r"sum '1\.add' cannot be separated.*ends in something else"),
        ([Doubled()], r"'1\.a' \(Conv2d\) goes into more than one sum"),
    ],
    ids=["ReLU behind", "activation last", "two sums"],
)
def test_sums_that_cannot_be_separated_are_refused(inside, message, digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *inside, nn.Flatten(), nn.Linear(256, 10)).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        RGAP()(observe(model, CE, x, y))


def test_a_frozen_branch_is_refused(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    block = Block(4, norm=False)
    block.branch[-1].weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), block, nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(UnsupportedModelError, match=r"'1\.add' cannot be separated.*'1\.branch\.3'.*frozen"):
        RGAP()(observe(model, CE, x, y))


def test_a_model_that_ends_in_a_block_is_refused(digit_pictures):
    x = digit_pictures.images[3:4]
    model = nn.Sequential(Block(1, 4, norm=False), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="starts at a linear layer behind the residual blocks"):
        RGAP()(observe(model, CE, x, torch.tensor([3])))


def test_relu_behind_average_pooling_hides_means(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    conv, pool = nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(2)
    model = seeded(lambda: nn.Sequential(conv, pool, nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)))
    row = RGAP()(observe(model, CE, x, y)).details["layers"][0]
    with torch.no_grad():
        means = pool(conv(x.float())).flatten()
    assert (row["layer"], row["hidden"], row["rank_bound"]) == ("1", int((means <= 0).sum()), int((means > 0).sum()))
    assert row["residual"] < 1e-10


def test_average_pooling_of_windows_that_overlap_can_be_undone(digit_pictures):
    """As many means as pixels, and a full rank."""
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    conv = nn.Conv2d(1, 4, 3, padding=1)
    pool = nn.AvgPool2d((2, 1), stride=1, padding=(1, 0))  # 9 x 8 means of an 8 x 8 picture
    model = seeded(lambda: nn.Sequential(conv, nn.Tanh(), pool, nn.Flatten(), nn.Linear(288, 10)))
    result = RGAP()(observe(model, CE, x, y))
    assert psnr(result.inputs, x) > 120
    assert result.converged


# ---------------------------------------------------------------------- two branches


@pytest.mark.parametrize(("kind", "turn"), [(nn.SiLU, -1.2785), (nn.GELU, -0.7518), (nn.Mish, -1.1924)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_activations_with_a_turn_give_a_digit_away(digit_pictures, kind, turn, scale):
    """With larger weights some units are below the turn: the equations tell which."""
    x, y = digit_pictures.images[1:2].double(), digit_pictures.labels[1:2]
    model = seeded(models.digits_convnet, 1).double()
    model[1], model[3] = kind(), kind()
    with torch.no_grad():
        model[0].weight.mul_(scale)
        model[2].weight.mul_(scale)
        arguments = model[2](model[1](model[0](x))), model[0](x)
    result = RGAP()(observe(model, CE, x, y, labels=False))
    rows = result.details["layers"]
    assert psnr(result.inputs, x) > 120
    assert result.converged
    assert [row["crossed"] for row in rows] == [int((z < turn).sum()) for z in arguments]
    assert scale == 1 or min(row["crossed"] for row in rows) > 0
    assert [row["ambiguous"] for row in rows] == [int((z < 0).sum()) for z in arguments]


def test_branches_that_are_not_resolved_are_no_convergence(digit_pictures):
    x, y = digit_pictures.images[2:3].double(), digit_pictures.labels[2:3]
    model = seeded(models.digits_convnet, 2).double()
    model[1] = model[3] = nn.GELU()
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[2].weight.mul_(10)
    result = RGAP()(observe(model, CE, x, y))
    assert psnr(result.inputs, x) < 40
    assert not result.converged


# ---------------------------------------------------------------------- batches on linear layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_examples_that_alone_activate_units_come_back_from_a_batch(digit_pictures, dtype):
    x, y = digit_pictures.images[:4], digit_pictures.labels[:4]
    model = seeded(lambda: models.fcn((64, 300, 10), activation="relu", bias=True))
    result = RGAP()(observe(model, CE, x, y, dtype=dtype, batch_size=4))
    exact = result.details["exact"]
    assert exact >= 3
    assert min(result.details["units"]) >= 3
    quality = [max(psnr(found, true) for true in x) for found in result.inputs]
    assert min(quality[:exact]) > (120 if dtype == torch.float64 else 60)
    nearest = {max(range(4), key=lambda i, found=found: psnr(found, x[i])) for found in result.inputs[:exact]}
    assert len(nearest) == exact  # no example twice
    assert result.converged == (exact == 4)
    assert f"{exact} of 4 examples" in result.details["note"]


@pytest.mark.parametrize("width", [80, 1000])
def test_no_mixture_is_taken_for_an_example(digit_pictures, width):
    """Among a thousand units some that share two examples have nearly the same ratio by chance."""
    for seed in range(5):
        x, y = (v[4 * seed : 4 * seed + 4] for v in (digit_pictures.images, digit_pictures.labels))
        model = seeded(lambda: models.fcn((64, width, 10), activation="relu", bias=True), seed)
        result = RGAP()(observe(model, CE, x, y, dtype=torch.float32, batch_size=4))
        quality = [max(psnr(found, true) for true in x) for found in result.inputs[: result.details["exact"]]]
        assert quality
        assert min(quality) > 60


@pytest.mark.parametrize("options", [{"activation": "tanh", "bias": True}, {"activation": "leaky_relu"}])
def test_a_batch_without_such_units_is_a_combination(digit_pictures, options):
    x, y = digit_pictures.images[:4], digit_pictures.labels[:4]
    model = seeded(lambda: models.fcn((64, 80, 10), **options))
    result = RGAP()(observe(model, CE, x, y, batch_size=4))
    assert result.details["exact"] == 0
    assert result.inputs.shape == (4, 1, 8, 8)
    assert all(torch.equal(found, result.inputs[0]) for found in result.inputs)
    assert not result.converged
    assert "combination" in result.details["note"]


def test_one_output_above_the_first_layer_makes_agreement_say_nothing(digit_pictures):
    """Every unit's `k` is then the same up to a factor: units that share two examples agree as well."""
    x, y = digit_pictures.images[:4], torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    model = seeded(lambda: models.fcn((64, 300, 1), activation="relu", bias=True))
    result = RGAP()(observe(model, BCE, x, y, batch_size=4))
    assert result.details["exact"] == 0
    assert not result.converged


# ---------------------------------------------------------------------- noise


def test_a_noisy_gradient_does_not_blow_up_silently():
    x = photos(32).images[:1]
    results = {}
    for noise in (1e-6, 1e-2):
        results[noise] = RGAP()(observe(seeded(models.cnn6), BCE, x, label(1.0), noise=noise))
    assert psnr(results[1e-6].inputs, x) > 60
    assert results[1e-6].converged
    assert not results[1e-2].converged
    assert results[1e-2].details["residual"] > 1e-2


@pytest.mark.parametrize(("noise", "at_least"), [(1e-4, 28), (1e-3, 15), (1e-2, 11)])
def test_damping_by_itself_is_as_good_as_the_best_fixed_one(noise, at_least, monkeypatch):
    """Most is gained by moving units back over their kinks; without either the picture is lost."""
    x = photos(32).images[:1]
    observation = observe(seeded(models.cnn6), BCE, x, label(1.0), noise=noise)
    automatic = RGAP()(observation)
    assert psnr(automatic.inputs, x) > at_least
    assert any(row["crossed"] for row in automatic.details["layers"])
    assert all(row["damping"] > 0 for row in automatic.details["layers"])
    with monkeypatch.context() as patch:
        patch.setattr("gradguard.attacks._closed_form.rgap_layer._ROUNDS", 0)
        fixed = [psnr(RGAP(damping=d)(observation).inputs, x) for d in (0.0, 1e-2, 1e-1)]
    assert psnr(automatic.inputs, x) > max(fixed)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 1e-2])
def test_automatic_damping_costs_nothing_where_none_is_needed(digit_pictures, noise):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    observation = observe(seeded(lambda: models.digits_convnet(activation="tanh")), CE, x, y, noise=noise)
    automatic, none = (psnr(RGAP(damping=d)(observation).inputs, x) for d in (None, 0.0))
    assert automatic > none - 0.5


def test_natural_damping_is_noise_over_signal():
    """A layer of 400 equations in 20 unknowns, as many as determine both to a tenth."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(20, 400, bias=False).double()
    layer = walk(LossGradient(module, nn.MSELoss()), (20,)).layers[0]
    w = module.weight.detach() / module.weight.detach().norm(dim=1, keepdim=True)
    x = torch.randn(20, generator=generator, dtype=torch.float64)
    for noise in (1e-12, 1e-3, 0.1):
        z = w @ x + noise * torch.randn(400, generator=generator, dtype=torch.float64)
        solver = LayerSolver(damping=None, max_iterations=100, tolerance=None)
        solved = solver.solve(layer, w, None, z, torch.ones_like(z))
        assert natural_damping(solved) == pytest.approx(noise / float(x.square().mean().sqrt()), rel=0.1)


def test_a_unit_that_rounding_puts_on_the_wrong_side_of_its_kink(digit_pictures, monkeypatch):
    """Two gradients, rounded to float32, of models that differ in the sign of one all but zero unit."""
    x, y = digit_pictures.images[3:4].double(), digit_pictures.labels[3:4]
    crossed, recovered, without = 0, [], []
    for sign in (1, -1):
        model = seeded(lambda: models.digits_convnet(activation="leaky_relu")).double()
        with torch.no_grad():
            z = model[0](x)[0, 5, 2, 1]
            model[0].bias[5] += sign * 1e-12 - z
        observation = observe(model, CE, x, y)
        rounded = {n: g.float().double() for n, g in observation.sent.items()}
        observation = dataclasses.replace(observation, sent=rounded)
        result = RGAP()(observation)
        crossed += sum(row["crossed"] for row in result.details["layers"])
        recovered.append(psnr(result.inputs, x))
        with monkeypatch.context() as patch:
            patch.setattr("gradguard.attacks._closed_form.rgap_layer._ROUNDS", 0)
            without.append(psnr(RGAP()(observation).inputs, x))
    assert crossed == 1
    assert min(recovered) > 120
    assert min(without) < 80 < max(without)


def test_damping_leaves_a_clean_gradient_a_little_wrong(digit_pictures, batch, convnet):
    x, y = batch[0][:1], batch[1][:1]
    clean, damped = (RGAP(damping=d)(observe(convnet, CE, x, y)) for d in (0.0, 1e-3))
    assert 20 < psnr(damped.inputs, x) < psnr(clean.inputs, x) - 50


def test_values_that_no_activation_gives_are_reported(digit_pictures):
    x, y = digit_pictures.images[3:4], digit_pictures.labels[3:4]
    model = seeded(lambda: models.digits_convnet(activation="sigmoid"))
    result = RGAP()(observe(model, CE, x, y, noise=0.5))
    assert result.details["layers"][0]["outside"] > 0
    assert not result.converged
    assert torch.isfinite(result.inputs).all()


def test_running_out_of_iterations_is_not_convergence(batch, convnet):
    result = RGAP(max_iterations=3, tolerance=1.0)(observe(convnet, CE, batch[0][:1], batch[1][:1]))
    assert [row["iterations"] for row in result.details["layers"]] == [3, 3]
    assert not result.converged


# ---------------------------------------------------------------------- refusals, before any solve


def test_a_batch_on_convolutions_is_refused(batch, convnet):
    observation = observe(convnet, CE, *batch, batch_size=4)
    with pytest.raises(InputError, match=r"one picture.*batch of 4.*convolutions"):
        RGAP()(observation)


def test_a_model_that_is_no_chain_is_refused_by_name(batch):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 10))
    with pytest.raises(UnsupportedModelError, match=r"'1' \(MaxPool2d\)"):
        RGAP().check(observe(model, CE, batch[0][:1], batch[1][:1]))


def without_bias(outputs):
    return models.fcn((64, 8, outputs))


@pytest.mark.parametrize(
    ("model", "loss", "y", "message"),
    [
        (without_bias(1), nn.L1Loss(), label(1.0), "'3'.*no bias.*BCEWithLogitsLoss"),
        (without_bias(3), nn.MSELoss(), torch.tensor([1]), "nor squared error.*outputs' shape"),
        (
            without_bias(1),
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])),
            label(1.0),
            "neither the binary logistic",
        ),
        (without_bias(3), nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([1]), "nor softmax cross-entropy"),
        (
            nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()),
            CE,
            torch.tensor([1]),
            r"'0' \(Conv2d\).*gradient of a convolution.*Flatten and Linear",
        ),
    ],
    ids=["L1", "MSE of a class index", "weighted BCE", "label smoothing", "convolution"],
)
def test_a_last_layer_that_gives_no_start_is_refused(batch, model, loss, y, message):
    with pytest.raises(UnsupportedModelError, match=message):
        RGAP().check(observe(model, loss, batch[0][:1], y))


def test_a_frozen_last_layer_is_refused(batch):
    model = without_bias(1)
    model[-1].weight.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"'3'.*weight is frozen"):
        RGAP().check(observe(model, BCE, batch[0][:1], label(1.0)))


def test_a_zero_gradient_is_refused(batch):
    observation = observe(without_bias(1), BCE, batch[0][:1], label(1.0))
    zero = {n: torch.zeros_like(g) for n, g in observation.sent.items()}
    with pytest.raises(InputError, match=r"'5\.weight'|'3\.weight'"):
        RGAP().check(
            Observation(loss_gradient=observation.loss_gradient, sent=zero, input_shape=(1, 8, 8), labels=label(1.0))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"damping": -1.0}, "`damping` must be None, or zero or positive"),
        ({"damping": math.inf}, "`damping` must be None, or zero or positive and finite"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1"),
    ],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        RGAP(**options)


def test_the_model_and_the_gradient_are_left_alone(batch, convnet):
    observation = observe(convnet, CE, batch[0][:1], batch[1][:1])
    before = {n: p.detach().clone() for n, p in convnet.named_parameters()}
    sent = {n: g.clone() for n, g in observation.sent.items()}
    RGAP()(observation)
    assert all(torch.equal(p, before[n]) for n, p in convnet.named_parameters())
    assert all(torch.equal(g, sent[n]) for n, g in observation.sent.items())
    assert all(p.grad is None for p in convnet.parameters())
