"""R-GAP beside DLG under gradient noise and low precision, on the LeNet with tanh and a biased head.

Gaussian noise of a norm relative to the gradient's, and the gradient rounded to float32, float16, bfloat16 and to 8
bits per tensor (symmetric, by the largest entry). PSNR in [0, 1], median over the pictures; labels known to both.
R-GAP as it is by default, where it damps each layer by what its equations leave over, and without any damping. "mean
picture" is the PSNR of the data set's mean, for which no gradient is needed. `--figure FILE` draws the result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard import LossGradient
from gradguard.attacks import DLG, RGAP, Attack, Observation
from gradguard.functional.vectors import norm
from gradguard.leakage import fidelity
from gradguard.zoo.models import lenet
from gradguard.zoo.pictures import digits

Gradient = dict[str, Tensor]
NOISE = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ATTACKS: dict[str, tuple[Attack, str]] = {  # and the colour
    "R-GAP": (RGAP(), "tab:green"),
    "R-GAP, undamped": (RGAP(damping=0.0), "tab:orange"),
    "DLG": (DLG(restarts=1, polish=10), "tab:blue"),
}


def main() -> None:
    """Every level for every attack."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--figure", type=Path, help="draw PSNR against noise to this file")
    options = parser.parse_args()
    pictures = real_pictures(options, "mnist_2000")
    grey = pictures.images if pictures else nn.functional.interpolate(digits().images, size=28, mode="bilinear")
    count = 2 if options.quick else 5
    subjects = [subject(options, grey[i : i + 1], i) for i in range(count)]
    changes: dict[str, tuple[float | None, Callable[[Gradient, int], Gradient]]] = {
        f"noise {ratio:g}": (ratio, partial(noisy, ratio=ratio, options=options)) for ratio in NOISE
    }
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        changes[name] = (None, partial(rounded, dtype=dtype))
    changes["8 bits"] = (None, lambda g, i: {n: eight_bits(v) for n, v in g.items()})
    mean = fidelity(grey.mean(0, keepdim=True).expand_as(grey[:count]), grey[:count]).psnr.median().item()
    rows = [row(options, name, ratio, change, subjects) for name, (ratio, change) in changes.items()]
    if options.figure:
        draw(rows, mean, options.figure)
    finish(options, figures={"noise": rows, "mean picture (dB)": mean}, tables=[rows_table("PSNR (dB)", rows)])


def subject(options: argparse.Namespace, image: Tensor, index: int) -> tuple[LossGradient, Tensor, Tensor, Gradient]:
    """A model of its own for each picture, and the true gradient in float64."""
    torch.manual_seed(options.seed + index)
    function = LossGradient(lenet(activation="tanh").double().to(options.device), nn.CrossEntropyLoss())
    x, y = image.double().to(options.device), torch.tensor([index % 10], device=options.device)
    return function, x, y, function(x, y)


def row(
    options: argparse.Namespace,
    what: str,
    ratio: float | None,
    change: Callable[[Gradient, int], Gradient],
    subjects: list[tuple[LossGradient, Tensor, Tensor, Gradient]],
) -> dict[str, Any]:
    """Median PSNR of each attack at one level."""
    psnr: dict[str, list[float]] = {attack: [] for attack in ATTACKS}
    ratios = []
    for index, (function, x, y, true) in enumerate(subjects):
        sent = change(true, index)
        ratios.append(float(norm({n: sent[n] - true[n] for n in true}) / norm(true)))
        seen = Observation(loss_gradient=function, sent=sent, input_shape=tuple(x.shape[1:]), labels=y)
        for name, (attack, _) in ATTACKS.items():
            found = attack(seen, generator=generator(options, index))
            psnr[name].append(0.0 if found.inputs is None else min(fidelity(found.inputs, x).psnr.item(), 400.0))
    return {"change": what, "noise_ratio": ratio or statistics.median(ratios)} | {
        n: statistics.median(v) for n, v in psnr.items()
    }


def noisy(gradient: Gradient, index: int, *, ratio: float, options: argparse.Namespace) -> Gradient:
    """Gaussian noise of `ratio` times the gradient's norm."""
    drawn = generator(options, 100 + index)
    noise = {n: torch.randn(g.shape, generator=drawn, dtype=torch.float64).to(g) for n, g in gradient.items()}
    scale = ratio * norm(gradient) / norm(noise)
    return {n: g + scale * noise[n] for n, g in gradient.items()}


def rounded(gradient: Gradient, index: int, *, dtype: torch.dtype) -> Gradient:
    """Through `dtype`."""
    return {n: v.to(dtype).double() for n, v in gradient.items()}


def eight_bits(value: Tensor) -> Tensor:
    """Rounded to 255 levels, symmetric about zero."""
    step = value.abs().max() / 127
    return (value / step).round() * step


def draw(rows: list[dict[str, Any]], mean: float, path: Path) -> None:
    """PSNR against relative noise, one line per attack; low precisions as marks at their own noise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    noise = [r for r in rows if r["change"].startswith("noise")]
    others = [r for r in rows if not r["change"].startswith("noise")]
    for attack, (_, color) in ATTACKS.items():
        axes.plot([r["noise_ratio"] for r in noise], [r[attack] for r in noise], "o-", color=color, label=attack)
        axes.plot([r["noise_ratio"] for r in others], [r[attack] for r in others], "x", color=color)
        if attack == "DLG":
            for r in others:
                axes.annotate(r["change"], (r["noise_ratio"], r[attack]), textcoords="offset points", xytext=(4, 6))
    axes.axhline(mean, color="tab:gray", linestyle=":", label="mean picture")
    axes.set_xscale("log")
    axes.set_xlabel("noise, relative to the gradient's norm")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
