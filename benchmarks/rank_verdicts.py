"""Rank analysis against attacks: does what it says of an architecture come true on real pictures?

Small networks of every verdict, at PyTorch's default initialisation, a new model per picture; digits and CIFAR-10 crops
at 8x8 (bundled photos where there is no CIFAR-10). R-GAP, H-GAP and DLG (float64, several restarts, second-order
polish) see the true gradient and the label. The verdict agrees if the medians over the pictures say the same:

- closed form: R-GAP is above 60 dB;
- optimisation only: it is not (or it refuses the model), and H-GAP or DLG is above 40 dB;
- not recoverable: none of the three is above 30 dB.

"mean picture" is the PSNR of the data set's mean, for which no gradient is needed. PSNR in [0, 1] with the picture
clamped, capped at 400 dB. Then the seconds that rank analysis takes of larger models.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table, seconds
from gradguard import LossGradient, UnsupportedModelError
from gradguard.attacks import DLG, HGAP, RGAP, Attack, Observation
from gradguard.leakage import fidelity, rank_analysis
from gradguard.zoo.models import cnn6, digits_convnet, fcn, lenet, resnet, vgg
from gradguard.zoo.pictures import Pictures, digits, photos

CAP = 400.0
CLOSED, OPTIMISED, LOST = 60.0, 40.0, 30.0  # dB
GREY, COLOUR = (1, 8, 8), (3, 8, 8)
Shape = tuple[int, ...]


def main() -> None:
    """The verdicts, then the seconds."""
    options = benchmark_parser(__doc__).parse_args()
    cifar = real_pictures(options, "cifar10_2000") or photos(32)
    pictures: dict[Shape, Pictures] = {GREY: digits(), COLOUR: replace(cifar, images=cifar.images[:, :, 12:20, 12:20])}
    count, restarts = (3, 4) if options.quick else (7, 8)
    rows = [verdict_row(options, case, pictures[case.shape], count, restarts) for case in CASES]
    times = timings()
    bars = [
        Bar("architectures", len(rows), 8, "at least"),
        Bar("share of verdicts that attacks confirm", statistics.mean(row["agrees"] for row in rows), 1.0, "at least"),
        Bar("slowest rank analysis (s)", max(row["seconds"] for row in times), 60.0, "at most"),
    ]
    figures = {"verdicts": rows, "seconds": times}
    finish(options, figures=figures, bars=bars, tables=[rows_table(n, r) for n, r in figures.items()])


# ---------------------------------------------------------------------- the architectures


def convnet(
    shape: Shape,
    *convolutions: tuple[int, int, int, int],
    act: Callable[[], nn.Module] = nn.Tanh,
    pool: Callable[[], nn.Module] | None = None,
    bias: bool = True,
    classes: int = 10,
) -> nn.Sequential:
    """Convolutions of `(filters, kernel, stride, padding)`, `pool` behind the first one, and a linear head."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for place, (filters, kernel, stride, padding) in enumerate(convolutions):
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding, bias=bias), act()]
        if pool is not None and place == 0:
            layers.append(pool())
        channels = filters
    layers.append(nn.Flatten())
    width = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class ResidualBlock(nn.Module):
    """A residual block with the activations first."""

    def __init__(self, channels: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.branch = nn.Sequential(act(), first, act(), last)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.branch(x)


def residual(channels: int, act: Callable[[], nn.Module]) -> nn.Sequential:
    """A convolution, two residual blocks and a linear head, on grey pictures."""
    blocks = (ResidualBlock(channels, act) for _ in range(2))
    stem = nn.Conv2d(1, channels, 3, padding=1)
    return nn.Sequential(stem, *blocks, nn.Flatten(), nn.Linear(64 * channels, 10))


@dataclass(frozen=True)
class Case:
    """`make`: a new model at each call, of inputs of `shape`."""

    name: str
    shape: Shape
    make: Callable[[], nn.Module]


leaky = partial(nn.LeakyReLU, 0.2)
CASES = (
    Case("digits_convnet, tanh", GREY, digits_convnet),
    Case("digits_convnet, ReLU", GREY, partial(digits_convnet, activation="relu")),
    Case("first layer of 1 filter", GREY, partial(convnet, GREY, (1, 3, 1, 1), (16, 3, 2, 1))),
    Case("FCN 64-8-10", GREY, partial(fcn, (64, 8, 10), activation="tanh", bias=True)),
    Case("FCN 64-6-20-10, no bias", GREY, partial(fcn, (64, 6, 20, 10))),
    Case("CNN6's first layers", COLOUR, partial(convnet, COLOUR, (12, 4, 2, 2), (36, 3, 2, 1), act=leaky, bias=False)),
    Case("narrow second layer, tanh", GREY, partial(convnet, GREY, (3, 3, 1, 1), (4, 3, 2, 1))),
    Case("narrow second layer, LeakyReLU", GREY, partial(convnet, GREY, (3, 3, 1, 1), (4, 3, 2, 1), act=leaky)),
    Case("narrow second layer, ReLU", GREY, partial(convnet, GREY, (8, 3, 1, 1), (8, 3, 2, 1), act=nn.ReLU)),
    Case("second layer of 1 filter", GREY, partial(convnet, GREY, (4, 5, 1, 2), (1, 3, 4, 1), classes=4)),
    Case("narrow second layer, colour", COLOUR, partial(convnet, COLOUR, (12, 4, 2, 2), (4, 3, 2, 1), act=leaky)),
    Case("average pooling", GREY, partial(convnet, GREY, (16, 3, 1, 1), (32, 3, 1, 1), pool=partial(nn.AvgPool2d, 2))),
    Case("maximum pooling", GREY, partial(convnet, GREY, (16, 3, 1, 1), (32, 3, 1, 1), pool=partial(nn.MaxPool2d, 2))),
    Case("digits_convnet, GELU", GREY, partial(digits_convnet, activation="gelu")),
    Case("narrow first layer, tanh", GREY, partial(convnet, GREY, (2, 3, 2, 1), (8, 3, 1, 1))),
    Case("narrow first layer, ReLU", GREY, partial(convnet, GREY, (2, 3, 2, 1), (8, 3, 1, 1), act=nn.ReLU)),
    Case(
        "narrow, max-pooled", GREY, partial(convnet, GREY, (2, 3, 1, 1), (16, 3, 1, 1), pool=partial(nn.MaxPool2d, 2))
    ),
    Case("stride 4", GREY, partial(convnet, GREY, (16, 3, 4, 1), (32, 3, 2, 1))),
    Case("stride 4, colour", COLOUR, partial(convnet, COLOUR, (12, 3, 4, 1), (24, 3, 1, 1))),
    Case("residual blocks, 12 filters, ReLU", GREY, partial(residual, 12, nn.ReLU)),
    Case("residual blocks, 4 filters, tanh", GREY, partial(residual, 4, nn.Tanh)),
    Case("narrow first layer, colour", COLOUR, partial(convnet, COLOUR, (3, 4, 4, 2), (36, 3, 2, 1), act=leaky)),
)


# ---------------------------------------------------------------------- attacks


def verdict_row(
    options: argparse.Namespace, case: Case, pictures: Pictures, count: int, restarts: int
) -> dict[str, Any]:
    """What rank analysis says of an architecture, and what the attacks get."""
    analysis = rank_analysis(case.make(), case.shape)
    attacks = (RGAP(), HGAP(), DLG(restarts=restarts, evaluations=300, polish=60))
    psnr: dict[str, list[float]] = {attack.name: [] for attack in attacks}
    for index in range(count):
        torch.manual_seed(options.seed + index)
        model = case.make().double().to(options.device)
        place = index % len(pictures)
        x = pictures.images[place : place + 1].double().to(options.device)
        for attack in attacks:
            psnr[attack.name].append(attacked(options, attack, model, x, int(pictures.labels[place]), index))
    medians = {name: statistics.median(values) for name, values in psnr.items()}
    seen = observed(medians)
    mean = pictures.images.mean(0, keepdim=True)
    known = fidelity(mean.expand_as(pictures.images), pictures.images).psnr[:count]
    return {
        "architecture": case.name,
        "verdict": analysis.verdict,
        "index": analysis.index,
        **{name: None if math.isnan(value) else value for name, value in medians.items()},
        "mean picture": known.median().item(),
        "observed": seen,
        "agrees": seen == analysis.verdict,
    }


def attacked(options: argparse.Namespace, attack: Attack, model: nn.Module, x: Tensor, label: int, index: int) -> float:
    """The PSNR (dB) that an attack gets from the true gradient; NaN if it refuses the model."""
    classes = model[-1].out_features  # type: ignore[index]
    y = torch.tensor([label % int(classes)], device=x.device)
    function = LossGradient(model, nn.CrossEntropyLoss())
    observation = Observation(loss_gradient=function, sent=function(x, y), input_shape=tuple(x.shape[1:]), labels=y)
    try:
        found = attack(observation, generator=generator(options, index))
    except UnsupportedModelError:
        return math.nan
    return 0.0 if found.inputs is None else min(fidelity(found.inputs, x).psnr.item(), CAP)


def observed(psnr: dict[str, float]) -> str:
    """The verdict that the attacks come to, by the rule above."""
    if psnr["RGAP"] > CLOSED:
        return "closed form"
    got = {name: value for name, value in psnr.items() if not math.isnan(value)}
    if max(value for name, value in got.items() if name != "RGAP") > OPTIMISED:
        return "optimisation only"
    return "not recoverable" if max(got.values()) <= LOST else "in between"


# ---------------------------------------------------------------------- seconds


def timings() -> list[dict[str, Any]]:
    """Seconds of the analysis of larger models."""
    rows = []
    for size in (32, 224):
        models: Sequence[tuple[str, Callable[[], nn.Module]]] = (
            ("LeNet", partial(lenet, in_channels=3, image_size=size)),
            ("CNN6", partial(cnn6_at, size, 36)),
            ("CNN6-d", partial(cnn6_at, size, 20)),
            ("VGG-11", partial(vgg, 11, image_size=size)),
            ("ResNet-18", partial(resnet, 18, large_inputs=size == 224)),
        )
        for name, make in models:
            analysis, elapsed = seconds(partial(rank_analysis, make().eval(), (3, size, size)))
            about = sum(layer.method == "estimated" for layer in analysis.layers)
            rows.append(
                {
                    "model": name,
                    "input": f"3x{size}x{size}",
                    "verdict": analysis.verdict,
                    "index": analysis.index,
                    "layers": len(analysis.layers),
                    "estimated": about,
                    "not computed": sum(layer.method == "not computed" for layer in analysis.layers),
                    "seconds": elapsed,
                }
            )
    return rows


def cnn6_at(size: int, second_channels: int) -> nn.Sequential:
    """CNN6 with a head for pictures of another size."""
    model = cnn6(second_channels=second_channels)
    width = model[:-1](torch.zeros(1, 3, size, size)).shape[1]
    return nn.Sequential(*list(model)[:-1], nn.Linear(width, 1, bias=False))


if __name__ == "__main__":
    main()
