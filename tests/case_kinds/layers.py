"""Layers: each alone in a small model, so that a wrong derivative has one place to come from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from case_kinds.case import Case, case, labels, pictures


def seq(*modules, inputs=pictures, targets=labels, loss_fn=nn.CrossEntropyLoss, mode="eval"):
    """A chain of modules; `modules` are functions of nothing, so that each case draws its own weights."""

    def make():
        model = nn.Sequential(*(m() for m in modules))
        model.train(mode == "train")
        return model, loss_fn(), inputs(), targets()

    return make


def conv_net(middle, *, features=32, inputs=pictures):
    """A convolution to two channels, what is tested, and a linear head."""
    return seq(lambda: nn.Conv2d(1, 2, 3, padding=1), middle, nn.Flatten, lambda: nn.Linear(features, 3), inputs=inputs)


def dense_net(middle, *, features=6, mode="eval"):
    """A linear layer to six features, what is tested, and a linear head."""
    return seq(
        lambda: nn.Linear(4, 6), middle, lambda: nn.Linear(features, 3), inputs=lambda: torch.rand(3, 4), mode=mode
    )


def with_statistics(norm):
    """A norm in eval mode whose running statistics are not the identity."""

    def make():
        module = norm()
        for name in ("running_mean", "running_var"):
            getattr(module, name).uniform_(0.2, 1.5)
        return module

    return make


def per_channel_prelu():
    module = nn.PReLU(2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.3, -0.7]))
    return module


def prelu_case(values):
    def make():
        return nn.Sequential(nn.PReLU(), nn.Linear(1, 2)), nn.CrossEntropyLoss(), torch.tensor(values), labels(2, 2)

    return make


class Through(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class TwoLayer(nn.Module):
    """Two linear layers joined by a rule of `forward`."""

    def __init__(self, forward, head: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(head, 3)
        self.rule = forward

    def forward(self, x):
        return self.head(self.rule(self, x))


def joined(rule, head=6):
    return lambda: (TwoLayer(rule, head), nn.CrossEntropyLoss(), torch.rand(3, 4), labels())


def residual(model, x):
    hidden = torch.tanh(model.first(x))
    return hidden + torch.tanh(model.second(hidden))


def concatenated(model, x):
    hidden = torch.tanh(model.first(x))
    return torch.cat([hidden, torch.sigmoid(model.second(hidden))], dim=1)


def gated(model, x):
    hidden = model.first(x)
    return hidden * torch.sigmoid(model.second(hidden))


class Recurrent(nn.Module):
    """A recurrent network over five steps, its last output to a head."""

    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.core = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 3)

    def forward(self, x):
        return self.head(self.core(x)[0][:, -1])


def recurrent(kind, **options):
    return lambda: (Recurrent(kind, **options), nn.CrossEntropyLoss(), torch.rand(3, 5, 3), labels())


class Cell(nn.Module):
    """A cell stepped by hand: its weights are used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return self.head(hidden)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as most people call it."""

    def __init__(self, need_weights: bool = False, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head, self.need_weights = nn.Linear(4, 3), need_weights

    def forward(self, x):
        mixed, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(mixed.mean(1))


class Encoder(nn.Module):
    """`nn.TransformerEncoderLayer`, with a class token and a table of positions, or with neither."""

    def __init__(self, class_token: bool = False, **options) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, **options)
        self.head = nn.Linear(4, 3)
        if class_token:
            self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Embedding(6, 4)
        self.class_token = class_token

    def forward(self, x):
        if self.class_token:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            x = x + self.positions(torch.arange(x.shape[1]))
        return self.head(self.layer(x)[:, 0])


def sequences(model, mode="eval"):
    return lambda: (model().train(mode == "train"), nn.CrossEntropyLoss(), torch.rand(3, 5, 4), labels())


class Positions(nn.Module):
    """A table of positions: parameters, but no function of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.inner, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("index", torch.arange(4))

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x + self.positions(self.index))).mean(1))


class Bag(Positions):
    """An `EmbeddingBag` that is looked up at fixed places."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.positions, self.by_hand = nn.EmbeddingBag(5, 3, mode="mean"), by_hand

    def forward(self, x):
        index = self.index[None, 1:]
        bag = self.positions.weight[index].mean(1) if self.by_hand else self.positions(index)
        return self.head(torch.tanh(self.inner(x)).mean(1) * bag)


class BilinearOfTwo(nn.Module):
    """`nn.Bilinear` of two halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.head = nn.Bilinear(2, 2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bilinear(x[:, :2], x[:, 2:])))


class Spectrum(nn.Module):
    """Fourier coefficients, filtered by real parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x[:, 0]) * self.filter, s=(4, 4)).flatten(1))


class Distances(nn.Module):
    """A head of prototypes under Euclidean distance."""

    def __init__(self, function) -> None:
        super().__init__()
        self.inner, self.prototypes = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3))
        self.function = function

    def forward(self, x):
        return -self.function(self.inner(x), self.prototypes)


def distances(function):
    return lambda: (Distances(function), nn.CrossEntropyLoss(), torch.rand(3, 4), labels())


def table(model):
    return lambda: (model(), nn.CrossEntropyLoss(), torch.rand(3, 4, 3), labels())


def euclidean(a, b):
    return (a[:, None] - b).square().sum(-1).sqrt()


def series():
    return torch.rand(3, 2, 6)


def volumes():
    return torch.rand(2, 1, 3, 3, 3)


CASES: list[Case] = [
    case("one linear layer", seq(lambda: nn.Linear(4, 3), inputs=lambda: torch.rand(3, 4)), "layer"),
    case("no bias", dense_net(lambda: nn.Linear(6, 6, bias=False)), "layer"),
    case(
        "conv1d",
        seq(lambda: nn.Conv1d(2, 3, 3), nn.Tanh, nn.Flatten, lambda: nn.Linear(12, 3), inputs=series),
        "layer",
    ),
    case(
        "conv3d",
        seq(
            lambda: nn.Conv3d(1, 2, 2),
            nn.Tanh,
            nn.Flatten,
            lambda: nn.Linear(16, 3),
            inputs=volumes,
            targets=lambda: labels(2),
        ),
        "layer",
    ),
    case("strided convolution", conv_net(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), features=12), "layer"),
    case(
        "transposed convolution",
        conv_net(lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=1), features=64),
        "layer",
    ),
    case("depthwise convolution", conv_net(lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2), features=64), "layer"),
    case("dilated convolution", conv_net(lambda: nn.Conv2d(2, 2, 2, dilation=2), features=8), "layer"),
    case(
        "reflect padding",
        conv_net(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        "layer",
    ),
    case("circular padding", conv_net(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), "layer"),
    case("padding same", conv_net(lambda: nn.Conv2d(2, 2, 3, padding="same")), "layer"),
    case("padding module", conv_net(lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3))), "layer"),
    case("GroupNorm", conv_net(lambda: nn.Sequential(nn.GroupNorm(2, 2), nn.SiLU())), "layer"),
    case("LayerNorm", dense_net(lambda: nn.LayerNorm(6)), "layer"),
    case("LayerNorm over pictures", conv_net(lambda: nn.LayerNorm([2, 4, 4])), "layer"),
    case("RMSNorm", dense_net(lambda: nn.RMSNorm(6)), "layer"),
    case("InstanceNorm, affine", conv_net(lambda: nn.InstanceNorm2d(2, affine=True)), "layer"),
    case("LocalResponseNorm", conv_net(lambda: nn.LocalResponseNorm(2)), "layer"),
    case("BatchNorm2d in eval", conv_net(with_statistics(lambda: nn.BatchNorm2d(2))), "layer"),
    case("BatchNorm1d in eval", dense_net(with_statistics(lambda: nn.BatchNorm1d(6))), "layer"),
    case("PReLU shared, plus then minus", prelu_case([[1.0], [-1.0]]), "layer"),
    case("PReLU shared, minus then plus", prelu_case([[-1.0], [1.0]]), "layer"),
    case("PReLU per channel", conv_net(per_channel_prelu), "layer"),
    case("PReLU within", dense_net(nn.PReLU), "layer"),
    *(
        case(f"{f.__name__}", dense_net(f), "layer")
        for f in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.Hardtanh)
    ),
    case("GELU by tanh", dense_net(lambda: nn.GELU(approximate="tanh")), "layer"),
    case("GLU", dense_net(nn.GLU, features=3), "layer"),
    case("softmax within", dense_net(lambda: nn.Softmax(dim=1)), "layer"),
    case("max pooling", conv_net(lambda: nn.MaxPool2d(2), features=8), "layer"),
    case("max pooling, overlapping", conv_net(lambda: nn.MaxPool2d(3, 2, 1), features=8), "layer"),
    case("average pooling", conv_net(lambda: nn.AvgPool2d(2), features=8), "layer"),
    case("adaptive pooling", conv_net(lambda: nn.AdaptiveAvgPool2d(1), features=2), "layer"),
    case("adaptive max pooling", conv_net(lambda: nn.AdaptiveMaxPool2d(2), features=8), "layer"),
    case("LP pooling", conv_net(lambda: nn.LPPool2d(2, 2), features=8), "layer"),
    case("Upsample, bilinear", conv_net(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), features=128), "layer"),
    case("Upsample, nearest", conv_net(lambda: nn.Upsample(scale_factor=2), features=128), "layer"),
    case(
        "PixelShuffle",
        conv_net(lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)), features=64),
        "layer",
    ),
    case("Unfold", conv_net(lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Flatten()), features=32), "layer"),
    case("Bilinear", lambda: (BilinearOfTwo(), nn.CrossEntropyLoss(), torch.rand(3, 4), labels()), "layer"),
    case("position table", table(Positions), "layer"),
    case(
        "EmbeddingBag at fixed places",
        table(lambda: Bag(False)),
        "layer",
        plain=table(lambda: Bag(True)),
        may_refuse="(?i)embedding_?bag",
    ),
    case("Fourier filter", lambda: (Spectrum(), nn.CrossEntropyLoss(), pictures(), labels()), "layer"),
    case("normalised in forward", joined(lambda m, x: torch.tanh(m.first((x - 0.5) / 0.25))), "layer"),
    case("residual", joined(residual), "layer"),
    case("dense concatenation", joined(concatenated, head=12), "layer"),
    case("gated", joined(gated), "layer"),
    case(
        "squeeze and excite by einsum",
        joined(lambda m, x: torch.einsum("bi,bi->bi", m.first(x), m.second(m.first(x)).sigmoid())),
        "layer",
    ),
    case("LSTM", recurrent(nn.LSTM), "recurrent"),
    case("LSTM, two layers, both ways", recurrent(nn.LSTM, num_layers=2, bidirectional=True), "recurrent", "slow"),
    case("GRU", recurrent(nn.GRU), "recurrent"),
    case("RNN", recurrent(nn.RNN), "recurrent"),
    case("GRUCell by hand", lambda: (Cell(), nn.CrossEntropyLoss(), torch.rand(3, 4, 3), labels()), "recurrent"),
    case("MultiheadAttention", sequences(SelfAttention), "attention"),
    case("MultiheadAttention with weights", sequences(lambda: SelfAttention(need_weights=True)), "attention"),
    case("MultiheadAttention with bias_kv", sequences(lambda: SelfAttention(add_bias_kv=True)), "attention"),
    case("TransformerEncoderLayer in eval", sequences(Encoder), "attention"),
    case(
        "TransformerEncoderLayer in train", sequences(lambda: Encoder(dropout=0.0), mode="train"), "attention", "slow"
    ),
    case(
        "TransformerEncoderLayer, norm first, class token",
        sequences(lambda: Encoder(class_token=True, norm_first=True, activation="gelu")),
        "attention",
    ),
    case("cdist", distances(torch.cdist), "layer", plain=distances(euclidean), may_refuse="(?i)cdist"),
    case("distances by hand", distances(lambda a, b: (a[:, None] - b).square().sum(-1)), "layer"),
    case("pairwise_distance", distances(lambda a, b: F.pairwise_distance(a[:, None], b[None])), "layer"),
]
