"""Gradient matching's numbers: DLG, iDLG's labels, Inverting Gradients, five local steps, and iLRG's restored labels.

PSNR in [0, 1] pixel space, pictures assigned to each other where a gradient is of several. Where the papers' networks
take normalised inputs the normalisation is the network's first layer. Beside each number stand two that need no
gradient: `mean_picture`, the PSNR of the mean of the data set's other pictures, and `prior_only`, that of the mean of
the Gaussian prior which the floors use, on its own terms. Learning rates and total variation are the papers', who count
in units of normalised inputs, turned into pixels' (times and over the standard deviation). Under --quick the networks
of Inverting Gradients and FedAvg are narrower, iterations fewer, and the column `shortened` says so; what would say
nothing then has no bar. A part alone (`--parts`) is kept under its own name.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table, seconds
from gradguard import LossGradient
from gradguard.attacks import DLG, IDLG, InvertingGradients, Observation, Reconstruction
from gradguard.attacks._matching.engine import MatchingAttack, UnknownLabels
from gradguard.functional.local_training import LocalTraining
from gradguard.leakage import fidelity
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.zoo.models import Normalised, convnet, fcn, lenet, resnet, uniform_init_
from gradguard.zoo.pictures import Pictures, digits, photos

CAP = 400.0
LOSS = nn.CrossEntropyLoss()
#: Mean and standard deviation per channel, as the authors normalise.
CIFAR10 = ([0.49147, 0.48226, 0.44677], [0.24703, 0.24349, 0.26159])
CIFAR100 = ([0.50716, 0.48669, 0.44120], [0.26733, 0.25644, 0.27615])
MNIST = ([0.13066], [0.30811])
Rows = list[dict[str, Any]]
Bars = list[Bar]
Scale = tuple[list[float], list[float]]


def main() -> None:
    """Run the parts."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run (default: all)")
    parser.add_argument("--pictures", type=int, help="of Inverting Gradients, one at a time (default 2 or 10)")
    options = parser.parse_args()
    figures: dict[str, Rows] = {}
    bars: Bars = []
    for part in options.parts:
        figures[part], more = PARTS[part](options)
        bars += more
    script = "reproduce_matching" if options.parts == list(PARTS) else "reproduce_matching_" + "_".join(options.parts)
    finish(
        options, figures=figures, bars=bars, tables=[rows_table(n, shown(r)) for n, r in figures.items()], script=script
    )


#: What the JSON holds and a terminal has no room for.
HIDDEN = ("data", "attack", "batches", "psnr_max", "prior_only", "restarts", "shortened")


def shown(rows: Rows) -> Rows:
    """The columns that fit a terminal."""
    return [{name: value for name, value in row.items() if name not in HIDDEN} for row in rows]


# ---------------------------------------------------------------------- what every part does


@dataclass(frozen=True)
class Problem:
    """Pictures of one data set under one network: `batches` `(N, B, *input_shape)` with `labels` `(N, B)`."""

    network: str
    gradient: LossGradient
    pictures: Pictures
    batches: Tensor
    labels: Tensor
    num_classes: int

    def observations(self, *, labels_known: bool, local: LocalTraining | None = None) -> list[Observation]:
        """What each batch's client sends."""
        send = self.gradient if local is None else lambda x, y: local.mean_gradient(self.gradient, x, y)
        return [
            Observation(
                loss_gradient=self.gradient,
                sent=send(x, y),
                input_shape=tuple(x.shape[1:]),
                batch_size=len(x),
                labels=y if labels_known else None,
                num_classes=self.num_classes,
                local=local,
            )
            for x, y in zip(self.batches, self.labels, strict=True)
        ]

    def mean_picture(self) -> float:
        """PSNR in dB of the mean of the data set's pictures that are not attacked, the mean over those that are."""
        attacked = self.batches.flatten(0, 1)
        known = (self.pictures.images.to(attacked)[:, None] == attacked[None]).flatten(2).all(2).any(1).cpu()
        others = self.pictures.images[~known] if not known.all() else self.pictures.images
        guess = others.mean(0, keepdim=True).expand_as(attacked)
        return psnrs(guess, attacked.cpu()).mean().item()


def problem(
    options: argparse.Namespace,
    network: str,
    make: Callable[[], nn.Module],
    pictures: Pictures,
    *,
    count: int,
    batch: int = 1,
    num_classes: int = 10,
    seed: int = 0,
    places: Sequence[int] | None = None,
) -> Problem:
    """The first `count` batches (or the pictures at `places`) under a network drawn with `--seed` plus `seed`."""
    torch.manual_seed(options.seed + seed)
    model = make().eval().to(options.device)
    index = torch.tensor(places) if places is not None else torch.arange(count * batch) % len(pictures)
    return Problem(
        network,
        LossGradient(model, LOSS),
        pictures,
        pictures.images[index].to(options.device).unflatten(0, (count, batch)),
        pictures.labels[index].to(options.device).unflatten(0, (count, batch)),
        num_classes,
    )


def attacked(
    options: argparse.Namespace, task: Problem, attack: MatchingAttack, observations: list[Observation]
) -> tuple[dict[str, Any], list[Reconstruction], Tensor]:
    """All batches at once: a row of figures, what was found, and PSNR `(N, B)`."""
    found, elapsed = seconds(
        lambda: attack.attack_all(observations, generator=generator(options)), device=options.device
    )
    psnr = torch.stack([psnrs(found[i].inputs, x) for i, x in enumerate(task.batches)])
    row = {
        "network": task.network,
        "data": task.pictures.name,
        "attack": attack.name,
        "batches": len(task.batches),
        "batch": task.batches.shape[1],
        "psnr_median": statistics.median(psnr.flatten().tolist()),
        "psnr_mean": psnr.mean().item(),
        "psnr_min": psnr.min().item(),
        "psnr_max": psnr.max().item(),
        "mean_picture": task.mean_picture(),
        "prior_only": -20 * math.log10(PowerLawPrior().std),
        "matching_loss": statistics.median(r.matching_loss for r in found),
        "iterations": attack.optimiser.evaluations,
        "restarts": attack.restarts,
        "seconds": elapsed,
    }
    return row, found, psnr


def psnrs(found: Tensor | None, truth: Tensor) -> Tensor:
    """`(B,)` in dB, best assignment, at most 400; 0 for what was not found."""
    if found is None:
        return torch.zeros(len(truth), dtype=torch.float64)
    return fidelity(found, truth).psnr.clamp_max(CAP)


def best(psnr: Tensor, count: int = 6) -> float:
    """The mean of the `count` best pictures of a batch, the figure of the iLRG paper."""
    return psnr.flatten().sort(descending=True).values[:count].mean().item()


def colour(options: argparse.Namespace) -> Pictures:
    """CIFAR-10, or the bundled photographs."""
    return real_pictures(options, "cifar10_2000") or photos(32)


def grey(options: argparse.Namespace) -> Pictures:
    """MNIST, or the bundled digits at its size."""
    real = real_pictures(options, "mnist_2000")
    if real is not None:
        return real
    small = digits()
    return replace(small, images=nn.functional.interpolate(small.images, size=28, mode="bilinear"))


def normalised(scale: Scale, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The network with the authors' normalisation as its first layer."""
    return lambda: nn.Sequential(Normalised(*scale), make())


# ---------------------------------------------------------------------- the parts


def dlg_lenet(**sizes: Any) -> nn.Module:
    """DLG's LeNet with its initialisation."""
    return uniform_init_(lenet(**sizes))


def small_convnet() -> nn.Module:
    """A smooth ConvNet for DLG, which names none: two convolutions with stride 2 and tanh, a linear head."""
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 5, 2, 2), nn.Tanh(), nn.Conv2d(24, 48, 3, 2, 1), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(48 * 64, 10)),
    )


def dlg(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """DLG on single colour pictures, labels from the last layer."""
    count, pictures = (4 if options.quick else 20), colour(options)
    rows: Rows = []
    # Starts within the value range: from standard normal ones two pictures in three end elsewhere on the ConvNet.
    for name, make, attack in (
        (
            "LeNet, sigmoid, U(-0.5, 0.5)",
            functools.partial(dlg_lenet, in_channels=3, image_size=32),
            IDLG(restarts=1, start_from="uniform", evaluations=3000 if options.quick else 6000, memory=100, polish=0),
        ),
        ("ConvNet, 2 layers, tanh", small_convnet, IDLG(restarts=1, start_from="normal", evaluations=300, polish=5)),
        ("ConvNet, 2 layers, tanh", small_convnet, IDLG(restarts=1, start_from="uniform", evaluations=300, polish=5)),
    ):
        task = problem(options, name, make, pictures, count=count)
        row = attacked(options, task, attack, task.observations(labels_known=False))[0]
        rows.append({"start": attack.start_from} | row)
    published = "(published by another toolkit: 23.41)"
    return rows, [
        Bar("DLG on LeNet, CIFAR-10, median PSNR (dB)", rows[0]["psnr_median"], 40.0, "at least"),
        Bar(f"DLG on a ConvNet, CIFAR-10, median PSNR (dB) {published}", rows[2]["psnr_median"], 25.0, "at least"),
    ]


def inverted(
    options: argparse.Namespace,
    network: str,
    make: Callable[[], nn.Module],
    *,
    count: int,
    iterations: int,
    batch: int = 1,
    scale: float = 0.25,
    shortened: bool = False,
) -> dict[str, Any]:
    """Inverting Gradients, labels known, as in the authors' notebooks. `scale`: from their units to pixels'."""
    task = problem(options, network, normalised(CIFAR10, make), colour(options), count=count, batch=batch)
    attack = InvertingGradients(iterations=iterations, learning_rate=0.1 * scale, total_variation=1e-4 / scale)
    row = attacked(options, task, attack, task.observations(labels_known=True))[0]
    return {"learning_rate": attack.learning_rate} | row | {"shortened": shortened}


def inverting_gradients(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """Inverting Gradients on single pictures under ConvNet-64."""
    width, iterations = (16, 1000) if options.quick else (64, 4000)
    count = options.pictures or (2 if options.quick else 10)
    row = inverted(
        options,
        f"ConvNet-{width}",
        lambda: convnet(width),
        count=count,
        iterations=iterations,
        shortened=options.quick,
    )
    if options.quick:
        gap = row["psnr_mean"] - row["mean_picture"]
        return [row], [Bar(f"IG on ConvNet-{width}, shortened, above the mean picture (dB)", gap, 2.0, "at least")]
    name = "IG on ConvNet-64, one picture, 4,000 iterations, mean PSNR (dB) (published: 16.03 normalised, about 28.1)"
    return [row], [Bar(name, row["psnr_mean"], 28.0, "at least")]


def inverting_gradients_resnet18(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """Inverting Gradients on single pictures under an untrained ResNet-18 (the published number is of another size)."""
    width, iterations = (16, 1000) if options.quick else (64, 4000)
    count = options.pictures or (2 if options.quick else 10)
    name = f"ResNet-18, width {width}"
    make = functools.partial(resnet, 18, width=width)
    return [inverted(options, name, make, count=count, iterations=iterations, shortened=options.quick)], []


def inverting_gradients_batch(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """Inverting Gradients on 8 pictures at once: a small network with the step in either units, then ConvNet-64."""
    name = "ConvNet, 2 layers, tanh"
    # The authors' step and total variation in pixels' units, and the same numbers taken as pixels'.
    rows = [
        inverted(options, name, small_convnet, count=1, batch=8, iterations=500, scale=scale) for scale in (0.25, 1.0)
    ]
    if options.quick:
        return rows, []
    rows.append(inverted(options, "ConvNet-64", convnet, count=1, batch=8, iterations=24000))
    published = "published: 3.77 normalised, about 15.9"
    return rows, [
        Bar(f"IG on ConvNet-64, 8 pictures, mean PSNR (dB) ({published})", rows[-1]["psnr_mean"], 15.9, "at least")
    ]


def restored_labels_mnist(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """iLRG's labels and then IG, against IG that looks for labels: one vector for the batch (the paper's), or each."""
    network = normalised(MNIST, lambda: fcn((784, 300, 300, 10), activation="relu", bias=True))
    task = problem(options, "FCN-3", network, grey(options), count=1, batch=50)
    attack = InvertingGradients(
        restarts=1 if options.quick else 3,
        iterations=2000 if options.quick else 8000,
        learning_rate=0.1 * 0.308,
        total_variation=1e-4 / 0.308,
    )
    rows = label_rows(options, task, attack)
    return rows, gains("MNIST FCN-3, batch 50", "published: 12.46 to 18.73", rows, 6.0)


def restored_labels_cifar100(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """The same on the 16 pictures of the paper's second experiment; under --quick too short for a bar."""
    pictures = real_pictures(options, "cifar100_ilrg_16")
    if pictures is None:
        return [], []
    width, iterations = (8, 200) if options.quick else (64, 24000)
    network = normalised(CIFAR100, lambda: resnet(18, num_classes=100, width=width))
    task = problem(options, f"ResNet-18, width {width}", network, pictures, count=1, batch=16, num_classes=100)
    attack = InvertingGradients(iterations=iterations, learning_rate=0.1 * 0.267, total_variation=8e-3 / 0.267)
    rows = label_rows(options, task, attack)
    bars = gains("CIFAR-100 ResNet-18, batch 16", "published: 10.02 to 17.51", rows, 7.0)
    return rows, [] if options.quick else bars


def label_rows(options: argparse.Namespace, task: Problem, attack: InvertingGradients) -> Rows:
    """The same attack with labels in four ways."""
    rows: Rows = []
    modes: tuple[UnknownLabels | None, ...] = ("shared", "joint", "inferred", None)
    for mode in modes:
        chosen = attack if mode is None else replace(attack, labels=mode)
        row, found, psnr = attacked(options, task, chosen, task.observations(labels_known=mode is None))
        labels = {"shared": "one vector", "joint": "each its own", "inferred": "iLRG", None: "known"}[mode]
        right = label_share(found[0].labels, task.labels[0], task.num_classes)
        rows.append(
            {"labels": labels, "best_6": best(psnr), "labels_right": right} | row | {"shortened": options.quick}
        )
    return rows


def gains(name: str, published: str, rows: Rows, target: float) -> Bars:
    """What restored labels are worth on the 6 best pictures, against the paper's baseline and a fairer one."""
    best_6 = {row["labels"]: row["best_6"] for row in rows}
    return [
        Bar(
            f"{name}: iLRG + IG over IG with {baseline}, 6 best (dB)",
            best_6["iLRG"] - best_6[which],
            target,
            "at least",
        )
        for which, baseline in (
            ("one vector", f"one label vector, as in the paper ({published})"),
            ("each its own", "labels each its own"),
        )
    ]


def label_share(found: Tensor | None, truth: Tensor, num_classes: int) -> float:
    """`sum_c min(n_hat_c, n_c) / B`: labels that are right, whatever their order."""
    assert found is not None, "matching attacks report labels"
    counts = [torch.bincount(y.cpu(), minlength=num_classes) for y in (found, truth)]
    return torch.minimum(*counts).sum().item() / len(truth)


def local_steps(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """FedAvg: five local steps on 8 pictures against a single gradient of the same pictures, labels known."""
    plan: list[tuple[str, Callable[[], nn.Module], int]] = [("ConvNet, 2 layers, tanh", small_convnet, 500)]
    if not options.quick:
        plan.append(("ConvNet-64", convnet, 8000))
    rows: Rows = []
    bars: Bars = []
    for name, make, iterations in plan:
        task = problem(options, name, normalised(CIFAR10, make), colour(options), count=1, batch=8)
        attack = InvertingGradients(iterations=iterations, learning_rate=0.1 * 0.25, total_variation=1e-3 / 0.25)
        local = LocalTraining(steps=5, learning_rate=0.1)
        one, five = (task.observations(labels_known=True, local=way) for way in (None, local))
        # The last is the attacker who does not know of the steps.
        cases = [(1, "known", one), (5, "known", five), (5, "taken for one", [replace(o, local=None) for o in five])]
        found = []
        for steps, training, observations in cases:
            row = attacked(options, task, attack, observations)[0]
            rows.append({"local_steps": steps, "training": training} | row)
            found.append(row["psnr_mean"])
        bars += [
            Bar(
                f"{name}, batch 8, one step: above the mean picture (dB)",
                found[0] - row["mean_picture"],
                3.0,
                "at least",
            ),
            Bar(f"{name}, batch 8: lost to 5 local steps (dB)", found[0] - found[1], 3.0, "at most"),
        ]
    return rows, bars


def single_labels(options: argparse.Namespace) -> tuple[Rows, Bars]:
    """Labels of single pictures: iDLG's rule against the labels that DLG optimises beside the picture."""
    rows: Rows = []
    count = 20 if options.quick else 100
    numbers, things = grey(options), real_pictures(options, "cifar100_400")
    sources = [("MNIST", numbers, 1, 28, 10), ("CIFAR-100", things, 3, 32, 100)]
    for name, pictures, channels, size, classes in sources:
        if pictures is None:
            continue
        places = torch.randperm(len(pictures), generator=generator(options))[:count].tolist()
        task = problem(
            options,
            "LeNet, sigmoid, U(-0.5, 0.5)",
            functools.partial(dlg_lenet, in_channels=channels, image_size=size, num_classes=classes),
            pictures,
            count=len(places),
            num_classes=classes,
            places=places,
        )
        observations = task.observations(labels_known=False)
        for rule, attack in (
            ("iDLG", IDLG(restarts=1, evaluations=1, polish=0)),
            ("DLG, joint", DLG(restarts=1, evaluations=150 if options.quick else 300, polish=0)),
        ):
            row, found, _ = attacked(options, task, attack, observations)
            shares = [label_share(r.labels, y, classes) for r, y in zip(found, task.labels, strict=True)]
            rows.append({"data_set": name, "rule": rule, "pictures": count, "labels_right": statistics.mean(shares)})
            rows[-1] |= {k: row[k] for k in ("iterations", "restarts", "seconds")}
    worst = min(row["labels_right"] for row in rows if row["rule"] == "iDLG")
    return rows, [Bar("iDLG: labels of single pictures, share right", worst, 1.0, "at least")]


PARTS: dict[str, Callable[[argparse.Namespace], tuple[Rows, Bars]]] = {
    "dlg": dlg,
    "inverting_gradients": inverting_gradients,
    "inverting_gradients_resnet18": inverting_gradients_resnet18,
    "inverting_gradients_batch": inverting_gradients_batch,
    "restored_labels_mnist": restored_labels_mnist,
    "restored_labels_cifar100": restored_labels_cifar100,
    "local_steps": local_steps,
    "single_labels": single_labels,
}


if __name__ == "__main__":
    main()
