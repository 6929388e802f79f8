"""The advice of rank analysis, applied: do the attacks fail, and what does it cost in accuracy?

LeNet (tanh, MNIST) and the digits ConvNet (digits), both closed form. For the original and each change that `advice`
proposes, best first (under `--quick` the best only): the verdict; the PSNR of R-GAP, H-GAP and DLG on real pictures
from the true gradient with the label known (float64, PyTorch's default initialisation, a new model per picture;
median); and the test accuracy after the same training (Adam), the mean over seeds. PSNR in [0, 1] with the picture
clamped, capped at 400 dB. "mean picture" is the PSNR of the data set's mean. Without MNIST only the digits are run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard.attacks import DLG, HGAP, RGAP
from gradguard.leakage import Advice, advice, advised, fidelity, rank_analysis
from gradguard.zoo.models import digits_convnet, lenet
from gradguard.zoo.pictures import Pictures, digits
from rank_verdicts import LOST, attacked

Make = Callable[[], nn.Module]


def main() -> None:
    """Both models."""
    options = benchmark_parser(__doc__).parse_args()
    mnist = real_pictures(options, "mnist_2000")
    subjects: list[tuple[str, Make, Pictures]] = [("digits_convnet", digits_convnet, digits())]
    if mnist is not None:
        subjects.append(("LeNet", partial(lenet, activation="tanh"), mnist))
    rows = [row for subject in subjects for row in advice_rows(options, *subject)]
    bars = []
    for name, *_ in subjects:
        best = next(row for row in rows if row["model"] == name and row["rank"] == 1)
        bars += [
            Bar(f"{name}, best advice: best attack (dB)", max(attacks_of(best)), LOST, "at most"),
            Bar(f"{name}, best advice: accuracy lost (points)", best["points lost"], 1.0, "at most"),
        ]
    finish(options, figures={"advice": rows}, bars=bars, tables=[rows_table("advice", rows)])


def attacks_of(row: dict[str, Any]) -> list[float]:
    """What the attacks got."""
    return [row[name] for name in ("RGAP", "HGAP", "DLG") if row[name] is not None]


def advice_rows(options: argparse.Namespace, name: str, make: Make, pictures: Pictures) -> list[dict[str, Any]]:
    """The original, and after each change."""
    shape = tuple(pictures.images.shape[1:])
    models: list[tuple[str, Make]] = [("none", make)]
    for change in advice(make(), shape, limit=1 if options.quick else 3):
        what = f"{change.layer}: {change.change} {change.before} -> {change.after}"
        models.append((what, changed(make, shape, change)))
    rows: list[dict[str, Any]] = []
    for rank, (what, build) in enumerate(models):
        analysis = rank_analysis(build(), shape)
        kept = accuracies(options, build, pictures)
        mean = statistics.mean(kept)
        rows.append(
            {
                "model": name,
                "rank": rank,
                "change": what,
                "verdict": analysis.verdict,
                "index": analysis.index,
                **psnr(options, build, pictures),
                "accuracy": mean,
                "spread": statistics.stdev(kept),
                "points lost": 100 * (rows[0]["accuracy"] - mean) if rows else 0.0,
            }
        )
    return rows


def changed(make: Make, shape: tuple[int, ...], change: Advice) -> Make:
    """What builds the changed model, with new weights at each call."""
    return lambda: advised(make(), shape, change)


def psnr(options: argparse.Namespace, build: Make, pictures: Pictures) -> dict[str, float | None]:
    """Median PSNR of each attack, and of the mean picture."""
    count, restarts, polish = (2, 1, 10) if options.quick else (5, 4, 50)
    attacks = (RGAP(), HGAP(), DLG(restarts=restarts, polish=polish))
    found: dict[str, list[float]] = {attack.name: [] for attack in attacks}
    for index in range(count):
        torch.manual_seed(options.seed + index)
        model = build().double().to(options.device)
        x = pictures.images[index : index + 1].double().to(options.device)
        for attack in attacks:
            found[attack.name].append(attacked(options, attack, model, x, int(pictures.labels[index]), index))
    medians = {attack: statistics.median(values) for attack, values in found.items()}
    mean = pictures.images.mean(0, keepdim=True).expand_as(pictures.images)
    known = fidelity(mean, pictures.images).psnr[:count].median().item()
    return {n: None if math.isnan(v) else v for n, v in medians.items()} | {"mean picture": known}


def accuracies(options: argparse.Namespace, build: Make, pictures: Pictures) -> list[float]:
    """Test accuracy for each seed: its own split, initialisation and order of batches."""
    seeds, steps = (3, 800) if options.quick else (5, 3000)
    return [trained(options, build, pictures, options.seed + seed, steps) for seed in range(seeds)]


def trained(options: argparse.Namespace, build: Make, pictures: Pictures, seed: int, steps: int) -> float:
    """The share of 500 test pictures that are classified rightly after `steps` batches of 32."""
    draw = generator(options, 1000 + seed)
    order = torch.randperm(len(pictures), generator=draw)
    test, train = order[:500], order[500:]
    torch.manual_seed(seed)
    model = build().to(options.device)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    images, labels = pictures.images.to(options.device), pictures.labels.to(options.device)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (32,), generator=draw)]
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).double().mean().item()


if __name__ == "__main__":
    main()
