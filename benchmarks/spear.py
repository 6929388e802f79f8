"""SPEAR: how many batches come back exactly, and in how many seconds, against batch size and the first layer's width.

Fully connected ReLU networks with biases and one or two hidden layers, as PyTorch draws them and after 300 steps of
Adam on the rest of the data; gradients in float32 and float64; digits (8x8, bundled) and MNIST (28x28, if at hand).
Batches are drawn without replacement from held-out pictures, labels are not given. "Exact" needs both: the attack says
that it has converged, and every picture of the batch comes back at 60 dB or more with its own label. `rank` is the
share of batches whose gradient has the full rank, without which no attack of this kind can succeed.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard import LossGradient
from gradguard.attacks import SPEAR, Observation
from gradguard.leakage import fidelity
from gradguard.zoo.models import fcn
from gradguard.zoo.pictures import Pictures, digits

LOSS = nn.CrossEntropyLoss()
HELD_OUT = 400
BATCHES = (1, 2, 4, 8, 12, 16)


def main() -> None:
    """Attack every setting, with as many batches each."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=None, help="batches per setting (default 4, or 10)")
    parser.add_argument("--max-samples", type=int, default=None, help="draws per batch (default 50,000, or 200,000)")
    options = parser.parse_args()
    repeats = options.repeats or (4 if options.quick else 10)
    attack = SPEAR(max_samples=options.max_samples or (50_000 if options.quick else 200_000))
    widths = (50, 200, 400) if options.quick else (50, 100, 200, 300, 400)
    found = {"digits": digits(), "MNIST": real_pictures(options, "mnist_2000")}
    rows = []
    for name, pictures in found.items():
        if pictures is None:
            continue
        for hidden, trained in ((1, False), (1, True), (2, True)):
            for width in widths:
                model = network(pictures, width, hidden, trained, options)
                for batch in BATCHES:
                    measured = [batches(model, pictures, batch, repeats, dtype, attack, options) for dtype in DTYPES]
                    about = {"data": name, "trained": trained, "hidden_layers": hidden, "width": width, "batch": batch}
                    rows.append(about | summary(measured))
    figures = {"rows": rows, "max_samples": attack.max_samples, "batches_per_setting": repeats}
    finish(options, figures=figures, bars=bars(rows), tables=[rows_table("SPEAR", rows)])


DTYPES = (torch.float32, torch.float64)


def network(
    pictures: Pictures, width: int, hidden: int, trained: bool, options: argparse.Namespace, steps: int = 300
) -> nn.Module:
    """A network on all but the held-out pictures, after `steps` of Adam with batches of 64, or none."""
    torch.manual_seed(options.seed)
    model = fcn((pictures.images[0].numel(), *[width] * hidden, 10), activation="relu", bias=True).to(options.device)
    if trained:
        rest, _ = pictures.split(HELD_OUT)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        draws = generator(options)
        for _ in range(steps):
            chosen = torch.randint(len(rest), (64,), generator=draws)
            optimiser.zero_grad()
            LOSS(model(rest.images[chosen].to(options.device)), rest.labels[chosen].to(options.device)).backward()
            optimiser.step()
    return model


def batches(
    model: nn.Module,
    pictures: Pictures,
    batch: int,
    repeats: int,
    dtype: torch.dtype,
    attack: SPEAR,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """`repeats` attacks: whether each was exact, said so, and how long it took."""
    _, held = pictures.split(HELD_OUT)
    function = LossGradient(model, LOSS)
    found = []
    for repeat in range(repeats):
        chosen = torch.randperm(len(held), generator=generator(options, repeat))[:batch]
        x, y = held.images[chosen].to(options.device), held.labels[chosen].to(options.device)
        seen = Observation(
            loss_gradient=function,
            sent=function.with_dtype(dtype)(x, y),
            input_shape=tuple(x.shape[1:]),
            batch_size=batch,
        )
        result = attack(seen, generator=generator(options, repeat))
        found.append(
            {
                "said": result.converged,
                "right": _right(result.inputs, result.labels, x, y),
                "seconds": result.seconds,
                "samples": result.details["samples"],
                "rank": result.details["rank"] == batch,
            }
        )
    return found


def _right(inputs: Tensor | None, labels: Tensor | None, x: Tensor, y: Tensor) -> bool:
    if inputs is None or labels is None:
        return False
    score = fidelity(inputs, x)
    return bool(score.psnr.min() >= 60) and torch.equal(labels[score.assignment], y)


def summary(measured: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Shares over batches for each precision, medians over both; `said_but_wrong`: converged on something else."""
    runs = [run for runs in measured for run in runs]
    shares = [sum(run["said"] and run["right"] for run in runs) / len(runs) for runs in measured]
    return {
        "exact_float32": shares[0],
        "exact_float64": shares[1],
        "rank": sum(run["rank"] for run in runs) / len(runs),
        "said_but_wrong": sum(run["said"] and not run["right"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "samples": statistics.median(run["samples"] for run in runs),
    }


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What is promised of untrained networks, and of what the attack says of itself."""
    eights = [r for r in rows if not r["trained"] and (r["width"], r["batch"]) == (200, 8)]
    small = [r for r in rows if not r["trained"] and r["width"] >= 200 and r["batch"] <= 4]
    return [
        Bar("batch of 8, 200 units, untrained: median seconds", max(r["seconds"] for r in eights), 1.0, "at most"),
        Bar(
            "batch of 8, 200 units, untrained: share exact in float32",
            min(r["exact_float32"] for r in eights),
            0.75,
            "at least",
        ),
        Bar(
            "batches up to 4, 200 units and more, untrained: least share exact",
            min(min(r["exact_float32"], r["exact_float64"]) for r in small),
            1.0,
            "at least",
        ),
        Bar("converged on something else, batches", sum(r["said_but_wrong"] for r in rows), 0, "at most"),
    ]


if __name__ == "__main__":
    main()
