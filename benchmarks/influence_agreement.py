"""Predicted against observed influence: where I2F says that an attacker lands, and where DLG really lands.

Triples of a model, a real picture and a perturbation of its gradient. Predicted: the closed form without damping
(`leakage.influence`). Observed: the Euclidean distance between the truth and what DLG finds (float64, labels known,
second-order polish). The attack never sees the truth. "random" start: standard normal. "continued": DLG on the
undisturbed gradient from random starts first, and from the attacker's own solution on to the perturbed gradient. That
is for networks on which random starts often end in other minima (ReLU, LeakyReLU) or take a minute (ResNet).

Perturbations are scaled so that the prediction is a given share of the picture's norm; pruning is taken as it is, at
the highest fraction of a ladder whose prediction is below 9%. A triple counts where the prediction is above three
times the attack's error on the undisturbed gradient and below 10% of the picture's norm.

Shares are 0.3% to 8% on smooth networks and 0.01% to 0.3% on piecewise linear ones: their gradient jumps where a unit
switches, and beyond the first switches no first order holds. The second table shows what is there (1% to 8%). Its rows
are kept out of the bars, although the rule above would count them; `everything in range` has the same figures with
them.
Pictures are MNIST and CIFAR-10 where they are at hand, else scikit-learn's digits and photographs, brought to the
size in the table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import interpolate

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard import InputJacobian, LossGradient
from gradguard.attacks import DLG, Observation
from gradguard.defenses import Defense, GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.functional.vectors import Gradient, add
from gradguard.leakage import influence, influence_lower_bound, spectrum
from gradguard.linalg import one_thread
from gradguard.zoo.models import fcn, lenet, resnet, uniform_init_
from gradguard.zoo.pictures import Pictures, digits, photos

#: Predicted error as a share of the picture's norm.
SMOOTH, PIECEWISE, BEYOND = (0.003, 0.01, 0.03, 0.08), (1e-4, 3e-4, 1e-3, 3e-3), (0.01, 0.03, 0.08)
PRUNED = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class ContinuedDLG(DLG):
    """DLG from a picture `(B, *input_shape)` that the attacker already has."""

    first: Tensor = field(repr=False)

    def start(self, shape: tuple[int, ...], observation: Observation, generator: torch.Generator | None) -> Tensor:
        """Every trial starts at `first`."""
        return self.first.to(self.dtype).expand(shape).clone()


@dataclass(frozen=True)
class Case:
    """A network, the size of its pictures, how many of them, and the attack.

    `clean`: the attack on the undisturbed gradient, and, unless `continued`, on the perturbed ones.
    `kinds`: also other perturbations than Gaussian noise.
    """

    name: str
    network: Callable[[], nn.Module] = field(repr=False)
    data: str
    size: int
    pictures: int
    shares: Sequence[float]
    clean: DLG
    continued: bool = False
    kinds: bool = True


def cases(quick: bool) -> Iterator[Case]:
    """The networks. The full run has more pictures and a wider ResNet."""
    more, random, thorough = (1 if quick else 3), DLG(restarts=1, polish=15), DLG(restarts=3, polish=25)
    small = 14
    yield Case("LeNet sigmoid", lambda: uniform_init_(lenet(image_size=small)), "grey", small, 1 + more, SMOOTH, random)
    # At this size the polish solves its steps inexactly; L-BFGS alone, long enough, ends closer to the minimum.
    long = DLG(restarts=1, evaluations=1500, polish=0)
    shares = (0.01, 0.05) if quick else SMOOTH
    yield Case("LeNet sigmoid", lambda: uniform_init_(lenet()), "grey", 28, more, shares, long, kinds=False)
    mlp = (small**2, 64, 32, 10)
    yield Case(
        "MLP sigmoid",
        lambda: uniform_init_(fcn(mlp, activation="sigmoid", bias=True)),
        "grey",
        small,
        more,
        SMOOTH,
        random,
    )
    yield Case(
        "MLP ReLU", lambda: fcn(mlp, activation="relu", bias=True), "grey", small, more, PIECEWISE, thorough, True
    )
    yield Case(
        "LeNet LeakyReLU",
        lambda: lenet(image_size=small, activation="leaky_relu"),
        "grey",
        small,
        more,
        PIECEWISE,
        thorough,
        True,
    )
    width = 4 if quick else 8
    yield Case(
        f"ResNet-10 softplus, width {width}",
        lambda: resnet(10, width=width, activation="softplus").eval(),
        "colour",
        8,
        more,
        SMOOTH,
        DLG(restarts=1, polish=15),
        True,
    )


def main() -> None:
    """Run all triples."""
    options = benchmark_parser(__doc__).parse_args()
    data = {
        "grey": real_pictures(options, "mnist_2000") or digits(),
        "colour": real_pictures(options, "cifar10_2000") or photos(),
    }
    rows: list[dict[str, Any]] = []
    beyond: list[dict[str, Any]] = []
    with one_thread():
        for case in cases(options.quick):
            for index in range(case.pictures):
                counted, past = triples(options, case, data[case.data], index)
                rows += counted
                beyond += past
    summary, everything = agreement(rows), agreement(rows + beyond)
    bars = [
        Bar("triples in range", summary["triples"], 40, "at least"),
        Bar("rank correlation of predicted and observed", summary["rank correlation"], 0.98, "at least"),
        Bar("median observed / predicted", summary["median ratio"], (0.95, 1.05), "within"),
        Bar("largest bound / observed", summary["largest bound / observed"], 1.0, "at most"),
        # With the rows beyond the kinks of piecewise linear networks, which the rule counts too.
        Bar("rank correlation, beyond the kinks too", everything["rank correlation"], 0.98, "at least"),
        Bar("largest bound / observed, beyond the kinks too", everything["largest bound / observed"], 1.0, "at most"),
    ]
    tables = [
        rows_table("Predicted and observed", [compact(row) for row in rows]),
        rows_table("Piecewise linear networks beyond their kinks", [compact(row) for row in beyond]),
    ]
    tables.append(
        rows_table(
            "Summary of what is in range",
            [{"triples of": "the bars"} | summary, {"triples of": "both tables"} | everything],
        )
    )
    figures = {
        "triples": rows,
        "beyond the kinks": beyond,
        "summary": [summary],
        "everything in range": [everything],
    }
    finish(options, figures=figures, bars=bars, tables=tables)


def agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the bars, over the rows in range; NaN where there are none."""
    counted = [row for row in rows if row["in range"]]
    predicted, observed = ([row[name] for row in counted] for name in ("predicted", "observed"))
    ratios = [row["ratio"] for row in counted]
    none = float("nan")
    return {
        "triples": len(counted),
        "rank correlation": float(spearmanr(predicted, observed).statistic) if len(counted) > 1 else none,
        "median ratio": statistics.median(ratios) if ratios else none,
        "least ratio": min(ratios, default=none),
        "largest ratio": max(ratios, default=none),
        "largest bound / observed": max((row["bound"] / row["observed"] for row in counted), default=none),
    }


def triples(
    options: argparse.Namespace, case: Case, pictures: Pictures, index: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one picture: those that are to count, and those beyond the kinks."""
    index %= len(pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + index)
        model = case.network().to(options.device)
    function = LossGradient(model, nn.CrossEntropyLoss(), dtype=torch.float64)
    x, y = (part[index : index + 1].to(options.device) for part in (pictures.images, pictures.labels))
    x = function.cast(resized(x, case.size))
    jacobian, true = InputJacobian(function, x, y), function(x, y)
    length = torch.linalg.vector_norm(x).item()
    observation = Observation(loss_gradient=function, sent=true, input_shape=tuple(x.shape[1:]), labels=y)
    own = case.clean(observation, generator=generator(options, index)).inputs
    assert own is not None
    undisturbed = torch.linalg.vector_norm(own - x).item()
    attack: DLG = case.clean
    if case.continued:
        attack = ContinuedDLG(first=own[None], restarts=1, evaluations=1, polish=15)

    def row(name: str, delta: Gradient) -> dict[str, Any]:
        seen = replace(observation, sent=add(true, delta))
        # Another start than that of the undisturbed attack.
        found = attack(seen, generator=generator(options, index + 1000))
        assert found.inputs is not None
        predicted = influence(jacobian, delta).value.item()
        observed = torch.linalg.vector_norm(found.inputs - x).item()
        return {
            "model": case.name,
            "data": pictures.name,
            "pixels": case.size,
            "picture": index,
            "start": "continued" if case.continued else "random",
            "perturbation": name,
            "predicted": predicted,
            "observed": observed,
            "ratio": observed / predicted if predicted else None,
            "bound": influence_lower_bound(jacobian, delta).value.item(),
            "share": predicted / length,
            "undisturbed error": undisturbed,
            "matching loss": found.matching_loss,
            "seconds": found.seconds,
            "in range": 3 * undisturbed < predicted < 0.1 * length,
        }

    draw = generator(options, index)
    counted = [row(name, delta) for name, delta in perturbations(jacobian, true, length, case, draw)]
    past: list[dict[str, Any]] = []
    if case.shares is PIECEWISE:
        unit = GaussianNoise(noise_ratio=1.0).checked_perturbation(true, jacobian, generator=draw)
        past = [row("GaussianNoise", moving(jacobian, unit, share * length)) for share in BEYOND]
    return counted, past


def perturbations(
    jacobian: InputJacobian, true: Gradient, length: float, case: Case, draw: torch.Generator
) -> Iterator[tuple[str, Gradient]]:
    """Isotropic noise at every share, directional noise and an eigenvector at some, pruning as it comes.

    The tenth eigenvector: along the first, the bound is the prediction itself, and the second order decides which
    side of it the attack ends on.
    """
    shares = case.shares
    noises: dict[Defense, Sequence[float]] = {GaussianNoise(noise_ratio=1.0): shares}
    if case.kinds:
        noises |= {PriorNoise(noise_ratio=1.0): shares[1:3], SmallEigenspaceNoise(noise_ratio=1.0): shares[1:3]}
    for noise, wanted in noises.items():
        unit = noise.checked_perturbation(true, jacobian, generator=draw)
        for share in wanted:
            yield noise.name, moving(jacobian, unit, share * length)
    if not case.kinds:
        return
    visible = spectrum(jacobian, 10).vectors[0, 9].reshape(jacobian.inputs.shape)
    image = {n: v[0] for n, v in jacobian.rmatvec(visible).items()}
    yield "J^T times the tenth eigenvector", moving(jacobian, image, shares[1] * length)
    fraction = pruned_fraction(jacobian, true, 0.09 * length)
    if fraction and shares is not PIECEWISE:
        yield f"Pruning {fraction:.0%}", Pruning(fraction=fraction).checked_perturbation(true)


def moving(jacobian: InputJacobian, delta: Gradient, distance: float) -> Gradient:
    """`delta` scaled so that I2F, which is linear in it, is `distance`."""
    unit = influence(jacobian, delta).value.item()
    return {n: d * (distance / unit) for n, d in delta.items()}


def pruned_fraction(jacobian: InputJacobian, true: Gradient, most: float) -> float | None:
    """The highest of `PRUNED` that is predicted to move the picture, but by no more than `most`."""
    found = None
    for fraction in PRUNED:
        moved = influence(jacobian, Pruning(fraction=fraction).checked_perturbation(true)).value.item()
        if moved > most:
            break
        found = fraction if moved > 1e-3 * most else found
    return found


def resized(images: Tensor, size: int) -> Tensor:
    """Pictures `(N, channels, height, width)` at `size` pixels: area means down, bicubic up."""
    if images.shape[-1] >= size:
        return interpolate(images, size=(size, size), mode="area")
    return interpolate(images, size=(size, size), mode="bicubic").clamp(0, 1)


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a terminal."""
    kept = ("perturbation", "predicted", "observed", "ratio", "bound", "share", "undisturbed error", "in range")
    return {"model": f"{row['model']}, {row['data']} {row['pixels']}, #{row['picture']}, {row['start']}"} | {
        name: row[name] for name in kept
    }


if __name__ == "__main__":
    main()
