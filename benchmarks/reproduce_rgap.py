"""R-GAP's numbers: CNN6, FCN3, ten classes with and without a bias, CNN6-d with the rank table, R-GAP, H-GAP and DLG.

Real pictures (CIFAR-10, MNIST) where they are at hand, else bundled ones; PyTorch's default initialisation, a new model
per picture; the label is the picture's own (parity of the class for the binary logistic loss) and is not given to the
attack. PSNR in [0, 1] with the picture clamped, capped at 400 dB. "float32" means a gradient computed and sent in
float32; every attack computes in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard import LossGradient
from gradguard.attacks import DLG, HGAP, RGAP, Attack, Observation
from gradguard.leakage import fidelity, rank_analysis
from gradguard.zoo.models import cnn6, fcn
from gradguard.zoo.pictures import Pictures, digits, photos

CAP = 400.0
BINARY, CLASSES = nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()


def main() -> None:
    """Run all tables."""
    options = benchmark_parser(__doc__).parse_args()
    colour = real_pictures(options, "cifar10_2000") or photos(32)
    grey = real_pictures(options, "mnist_2000") or enlarged(digits())
    count = 5 if options.quick else 20
    rows = []
    for dtype in (torch.float64, torch.float32):
        for name, make, loss, pictures in (
            ("CNN6", cnn6, BINARY, colour),
            ("FCN3", lambda: fcn((784, 1000, 100, 1)), BINARY, grey),
            ("CNN6, 10 classes, bias", lambda: cnn6(num_classes=10, head_bias=True), CLASSES, colour),
            ("CNN6, 10 classes, no bias", lambda: cnn6(num_classes=10), CLASSES, colour),
        ):
            rows.append(table_row(options, RGAP(), name, make, loss, pictures, count, dtype))
    deficient = [
        table_row(options, attack, "CNN6-d", lambda: cnn6(second_channels=20), BINARY, colour, number, torch.float64)
        for attack, number in ((RGAP(), count), (HGAP(), 3 if options.quick else 10), (DLG(restarts=2), 2))
    ]
    ranks = rank_rows()

    def psnr(model: str, dtype: str) -> float:
        return next(r["psnr_median"] for r in rows if r["model"] == model and r["gradient"] == dtype)

    second = next(r for r in ranks if r["model"] == "CNN6-d" and r["layer"] == 2)
    hybrid = next(r for r in deficient if r["attack"] == "HGAP")
    others = max(r["psnr_median"] for r in deficient if r["attack"] != "HGAP")
    bars = [
        Bar("CNN6, float64, median PSNR (dB)", psnr("CNN6", "float64"), 120.0, "at least"),
        Bar("CNN6, float32 gradients, median PSNR (dB)", psnr("CNN6", "float32"), 60.0, "at least"),
        Bar("FCN3, float64, median PSNR (dB)", psnr("FCN3", "float64"), 120.0, "at least"),
        Bar("CNN6, 10 classes, bias, float32 (dB)", psnr("CNN6, 10 classes, bias", "float32"), 60.0, "at least"),
        Bar("CNN6, 10 classes, no bias, float32 (dB)", psnr("CNN6, 10 classes, no bias", "float32"), 60.0, "at least"),
        Bar("labels recovered by R-GAP", min(r["labels_right"] for r in rows), 1.0, "at least"),
        Bar("CNN6-d layer 2, rank", second["rank"], (3188, 3188), "within"),
        Bar("CNN6-d layer 2, deficit", second["deficit"], (280, 280), "within"),
        Bar("CNN6-d layer 2, virtual constraints", second["virtual"], (396, 396), "within"),
        Bar("H-GAP on CNN6-d, median PSNR (dB)", hybrid["psnr_median"], 25.0, "at least"),
        Bar("H-GAP over the better of R-GAP and DLG (dB)", hybrid["psnr_median"] - others, 0.0, "at least"),
    ]
    figures = {"closed_form": rows, "deficient": deficient, "ranks": ranks}
    finish(options, figures=figures, bars=bars, tables=[rows_table(n, r) for n, r in figures.items()])


def table_row(
    options: argparse.Namespace,
    attack: Attack,
    name: str,
    make: Callable[[], nn.Module],
    loss_fn: nn.Module,
    pictures: Pictures,
    count: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One attack on `count` pictures, each with its own model and label."""
    psnr, times, right, converged = [], [], [], []
    for index in range(count):
        torch.manual_seed(options.seed + index)
        model = make().to(options.device, dtype)
        place = index % len(pictures)
        x = pictures.images[place : place + 1].to(options.device, dtype)
        y = label(pictures.labels[place], loss_fn).to(options.device)
        y = y.to(dtype) if y.is_floating_point() else y
        function = LossGradient(model, loss_fn)
        # DLG of the paper knows the label or optimises it; here it is given, which only helps it.
        given = y if isinstance(attack, DLG) else None
        observation = Observation(
            loss_gradient=function, sent=function(x, y), input_shape=tuple(x.shape[1:]), labels=given
        )
        start = time.perf_counter()
        found = attack(observation, generator=generator(options, index))
        times.append(time.perf_counter() - start)
        converged.append(found.converged)
        missing = found.inputs is None
        psnr.append(0.0 if missing else min(fidelity(found.inputs, x).psnr.item(), CAP))
        right.append(found.labels is not None and torch.equal(found.labels.to(y), y))
    return {
        "model": name,
        "attack": attack.name,
        "gradient": str(dtype).removeprefix("torch."),
        "data": pictures.name,
        "pictures": count,
        "psnr_median": statistics.median(psnr),
        "psnr_min": min(psnr),
        "labels_right": statistics.mean(right),
        "says_converged": statistics.mean(converged),
        "seconds_median": statistics.median(times),
    }


def label(truth: Tensor, loss_fn: nn.Module) -> Tensor:
    """The class, or whether it is odd for a loss of two."""
    return (truth % 2).reshape(1, 1).double() if isinstance(loss_fn, nn.BCEWithLogitsLoss) else truth.reshape(1)


def rank_rows() -> list[dict[str, Any]]:
    """The rank table of both networks."""
    rows = []
    for name, channels in (("CNN6", 36), ("CNN6-d", 20)):
        analysis = rank_analysis(cnn6(second_channels=channels), (3, 32, 32))
        for number, layer in enumerate(analysis.layers[:-1], 1):
            rows.append(
                {
                    "model": name,
                    "layer": number,
                    "unknowns": layer.unknowns,
                    "outputs": layer.outputs,
                    "weights": layer.weights,
                    "rank_W": layer.rank_weights,
                    "rank_K": layer.rank_gradients,
                    "rank": layer.rank,
                    "deficit": layer.deficit,
                    "virtual": layer.virtual_constraints,
                    "verdict": layer.verdict,
                }
            )
    return rows


def enlarged(pictures: Pictures, size: int = 28) -> Pictures:
    """Digits at the size of MNIST's."""
    images = nn.functional.interpolate(pictures.images, size=(size, size), mode="bicubic").clamp(0, 1)
    return Pictures(images, pictures.labels, pictures.class_names, f"{pictures.name} at {size}x{size}")


if __name__ == "__main__":
    main()
