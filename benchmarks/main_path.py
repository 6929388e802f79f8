"""The main job end to end: closed-form and optimised attacks, predicted against observed influence, and what the
default defense takes from attacks and from accuracy.

R-GAP on CNN6 and FCN3 (random weights) and DLG on the sigmoid LeNet (uniform weights), in float64, on bundled
pictures and, where they are at hand, on CIFAR-10 and MNIST; labels known, PSNR in [0, 1]. The influence check of the
demo on the first round's model, where its bar stands, and, without a bar, on a model trained with the defense, for
the two pictures whose gradient says most. Accuracy on 500 held-out digits after 100 steps, mean over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard import Guard, LossGradient
from gradguard.attacks import DLG, RGAP, Attack, Observation
from gradguard.defenses import PriorNoise
from gradguard.demo import Demo, accuracy, influence_check
from gradguard.leakage import fidelity
from gradguard.report.leakage_report import Case
from gradguard.report.scores import best_per_example
from gradguard.zoo.models import cnn6, fcn, lenet, uniform_init_
from gradguard.zoo.pictures import digits, photos

#: A perfect reconstruction has no PSNR that JSON can carry.
CAP = 400.0


def main() -> None:
    """Run all parts."""
    options = benchmark_parser(__doc__).parse_args()
    attacks = attack_rows(options)
    checks = influence_rows(options)
    accuracies = accuracy_row(options)
    defended = defense_rows(options)

    def psnr(attack: str, model: str) -> float:
        return min(r["psnr_min"] for r in attacks if r["attack"] == attack and r["model"] == model)

    first = [r for r in checks if r["model"] == "first round" and r["in_range"]]
    bars = [
        Bar("R-GAP on CNN6, float64, least PSNR (dB)", psnr("RGAP", "CNN6"), 120.0, "at least"),
        Bar("R-GAP on FCN3, float64, least PSNR (dB)", psnr("RGAP", "FCN3"), 120.0, "at least"),
        Bar("DLG on the sigmoid LeNet, least PSNR (dB)", psnr("DLG", "LeNet"), 30.0, "at least"),
        Bar("influence, largest |observed / predicted - 1|", max(abs(r["ratio"] - 1) for r in first), 0.1, "at most"),
        Bar("accuracy lost to the default defense", accuracies["without"] - accuracies["with"], 0.01, "at most"),
    ]
    tables = [
        rows_table("Attacks", attacks),
        rows_table("Influence", checks),
        rows_table("Accuracy", [accuracies]),
        rows_table("The default defense on a trained model, best attack per picture", defended),
    ]
    figures = {"attacks": attacks, "influence": checks, "accuracy": [accuracies], "defense": defended}
    finish(options, figures=figures, bars=bars, tables=tables)


def attack_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """PSNR and seconds of R-GAP and DLG on each model's pictures."""
    count = 2 if options.quick else 5
    mnist, cifar = real_pictures(options, "mnist_2000"), real_pictures(options, "cifar10_2000")
    colour = {"photos": photos().images} | ({"CIFAR-10": cifar.images[:count]} if cifar else {})
    grey = {"digits at 28x28": enlarged(digits().images[:count])} | ({"MNIST": mnist.images[:count]} if mnist else {})
    binary = nn.BCEWithLogitsLoss()
    rows = []
    for data, images in colour.items():
        rows.append(attacked(options, RGAP(), "CNN6", cnn6, binary, data, images))
    for data, images in grey.items():
        rows.append(attacked(options, RGAP(), "FCN3", lambda: fcn((784, 1000, 100, 1)), binary, data, images))
        rows.append(
            attacked(
                options, DLG(restarts=2), "LeNet", lambda: uniform_init_(lenet()), nn.CrossEntropyLoss(), data, images
            )
        )
    return rows


def attacked(
    options: argparse.Namespace,
    attack: Attack,
    model_name: str,
    make: Callable[[], nn.Module],
    loss_fn: nn.Module,
    data: str,
    images: Tensor,
) -> dict[str, Any]:
    """One attack on each picture's own gradient; the model is drawn anew for each."""
    psnr, times = [], []
    for index, image in enumerate(images):
        torch.manual_seed(options.seed + index)
        model = make().double().to(options.device)
        x = image[None].double().to(options.device)
        binary = isinstance(loss_fn, nn.BCEWithLogitsLoss)
        y = torch.ones(1, 1, dtype=x.dtype) if binary else torch.tensor([index % 10])
        function, y = LossGradient(model, loss_fn), y.to(options.device)
        observation = Observation(loss_gradient=function, sent=function(x, y), input_shape=tuple(image.shape), labels=y)
        found = attack(observation, generator=generator(options, index))
        assert found.inputs is not None
        psnr.append(min(fidelity(found.inputs, x).psnr.item(), CAP))
        times.append(found.seconds)
    return {
        "attack": attack.name,
        "model": model_name,
        "data": data,
        "pictures": len(images),
        "psnr_median": statistics.median(psnr),
        "psnr_min": min(psnr),
        "seconds_median": statistics.median(times),
    }


def enlarged(images: Tensor) -> Tensor:
    """Digits at the size of MNIST's."""
    return torch.nn.functional.interpolate(images, size=(28, 28), mode="bicubic").clamp(0, 1)


def influence_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted against observed, on the first round's model and on a trained one."""
    demo = Demo(seed=options.seed, device=options.device.type)
    train, _ = digits().split(500)
    inputs, targets = train.images[: demo.audited].to(options.device), train.labels[: demo.audited].to(options.device)
    trained = demo.train(train, Guard(defense=PriorNoise(), attacks=())).model
    gradients = LossGradient(trained, nn.CrossEntropyLoss()).per_example(inputs, targets)
    length = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    exposed = length.argsort(descending=True)[:2]
    cases = {
        "first round": (demo.module().model.to(options.device), torch.arange(2)),
        "after 100 steps": (trained, exposed),
    }
    rows = []
    for name, (model, chosen) in cases.items():
        for row in influence_check(model, inputs[chosen], targets[chosen], generator=generator(options)):
            rows.append(
                {
                    "model": name,
                    "perturbation": row["perturbation"],
                    "picture": row["example"],
                    "predicted": row["predicted"],
                    "observed": row["observed"],
                    "ratio": row["observed"] / row["predicted"],
                    "in_range": row["in_range"],
                }
            )
    return rows


def accuracy_row(options: argparse.Namespace) -> dict[str, Any]:
    """Mean accuracy without and with the defense at its default strength."""
    train, test = digits().split(500)
    seeds = range(options.seed, options.seed + (6 if options.quick else 20))
    guard = Guard(defense=PriorNoise(), attacks=())
    means = {}
    for name, used in (("without", None), ("with", guard)):
        values = [accuracy(Demo(seed=s, device=options.device.type).train(train, used), test) for s in seeds]
        means[name] = statistics.mean(values)
        means[f"deviation_{name}"] = statistics.stdev(values)
    return {"defense": repr(PriorNoise()), "seeds": len(seeds)} | means


def defense_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What R-GAP and DLG get from the gradient of 16 digits on a trained model, without and with the defense."""
    demo = Demo(seed=options.seed, device=options.device.type)
    train, _ = digits().split(500)
    guard = Guard(defense=PriorNoise(), attacks=(RGAP(), DLG(restarts=2)))
    model = demo.train(train, guard).model
    inputs, targets = (part[: demo.audited].to(options.device) for part in (train.images, train.labels))
    report = guard.audit(model, nn.CrossEntropyLoss(), inputs, targets, generator=generator(options))
    rows = []
    cases: tuple[Case, ...] = ("without", "with")
    found = {case: best_per_example(report.scores(case).values(), len(report.attacked)) for case in cases}
    for place, index in enumerate(report.attacked):
        best = {case: psnr[place] for case, psnr in found.items()}
        predicted = report.predicted_error[index]
        rows.append({"picture": index, "label": report.labels[index], "predicted_error": predicted} | best)
    return rows


if __name__ == "__main__":
    main()
