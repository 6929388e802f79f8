"""Label restoration from the last layer's gradient: iLRG's published numbers, the same method here, and gradguard's.

For each setting of Ma et al. (ICLR 2023), untrained networks, random batches: LeAcc/LnAcc/IRec as published, of the
published method as run here (counts rounded class by class, as the authors do), and of `ILRG()` (counts that sum to
the batch size). "Least margin" is the least of our three numbers less the paper's. The paper has one network and 50
batches of the whole data set; here there are several networks, and slices of the data (MNIST 2,000 pictures,
CIFAR-100 400): CIFAR-100 batches of 32 and more are drawn with replacement, all others without. Where the real images
are missing, scikit-learn's digits take MNIST's place, against no published number. On trained networks the comparison
is loose, and no bar: the paper trains on 60,000 pictures, the rows here on 1,000, with batches from 1,000 others. Then
the time of one restoration
at 1,000 classes, 2,048 features and 4,096 examples, against the published method written class by class and element
by element.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from common import Bar, benchmark_parser, finish, generator, paired_times, real_pictures, rows_table, seconds
from gradguard import LossGradient
from gradguard.attacks.labels import restore_label_counts
from gradguard.data import Pictures, digits
from gradguard.leakage.labels import count_labels, label_recovery
from gradguard.models import fcn

METRICS = ("LeAcc", "LnAcc", "IRec")
#: Per channel, as the authors normalise.
MEAN_AND_DEVIATION = {
    "mnist_2000": ([0.13066], [0.30811]),
    "cifar100_400": ([0.50716, 0.48669, 0.44120], [0.26733, 0.25644, 0.27615]),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "SiLU": nn.SiLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.01),
}


@dataclass(frozen=True)
class Setting:
    """A row of the paper: a network, a batch size, and what was published (`None`: nothing).

    `trained`: iterations on the data's first half; batches then come from the second half.
    """

    name: str
    data: str
    network: Callable[[], nn.Module] = field(repr=False)
    batch: int
    published: tuple[float, float, float] | None
    replacement: bool = False
    trained: int = 0


def fully_connected(hidden: int, features: int = 784) -> nn.Module:
    """The paper's FCN on `features` pixels, with `hidden` hidden layers after the first."""
    return fcn((features, 300, *[300] * hidden, 10), activation="relu", bias=True)


def lenet5(activation: Callable[[], nn.Module]) -> nn.Module:
    """The paper's LeNet-5 for 32x32 RGB pictures; convolutions Kaiming-normal over the fan out."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 100)),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def settings(real: bool) -> Iterator[Setting]:
    """The rows, in the order of the paper's tables."""
    if not real:
        for batch in (4, 8, 16, 24, 32, 64, 128):
            yield Setting("FCN-3 digits", "digits", lambda: fully_connected(1, 64), batch, None)
        return
    for batch, published in {
        4: (1, 1, 1),
        8: (1, 1, 1),
        16: (1, 1, 1),
        24: (1, 0.994, 1),
        32: (0.982, 0.804, 0.975),
        64: (0.998, 0.598, 0.957),
        128: (1, 0.386, 0.963),
    }.items():
        yield Setting("FCN-3 MNIST", "mnist_2000", lambda: fully_connected(1), batch, published)
    depths = {0: (0.988, 0.328, 0.887), 2: (1, 0.768, 0.975), 3: (1, 1, 1), 4: (1, 0.996, 1)}
    for hidden, published in depths.items():
        name = f"FCN-{hidden + 2} MNIST"
        yield Setting(name, "mnist_2000", functools.partial(fully_connected, hidden), 64, published)
    for trained, published in {100: (0.745, 0.555, 0.613), 1000: (0.645, 0.485, 0.450)}.items():
        name = f"FCN-3 MNIST, {trained} iterations"
        yield Setting(name, "mnist_2000", lambda: fully_connected(1), 8, published, trained=trained)
    for activation, module in ACTIVATIONS.items():
        name = f"LeNet-5 {activation} CIFAR-100"
        yield Setting(name, "cifar100_400", functools.partial(lenet5, module), 24, (1, 1, 1))
    for batch, published in {
        32: (1, 1, 1),
        64: (1, 1, 1),
        128: (1, 1, 1),
        256: (1, 0.997, 1),
        512: (1, 0.960, 1),
        1024: (1, 0.851, 0.992),
    }.items():
        yield Setting(
            "LeNet-5 ReLU CIFAR-100", "cifar100_400", lambda: lenet5(nn.ReLU), batch, published, replacement=True
        )


# ---------------------------------------------------------------------- how much is recovered


def train_(model: nn.Module, images: Tensor, labels: Tensor, iterations: int, draw: torch.Generator) -> None:
    """As the authors train: SGD with Nesterov momentum, learning rate 0.1, weight decay 5e-4, batch 128."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(iterations):
        chosen = torch.randint(len(images), (128,), generator=draw).to(images.device)
        optimiser.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimiser.step()


def recovery(setting: Setting, pictures: Pictures, options: argparse.Namespace) -> dict[str, object]:
    """Means over networks and batches: of the published method, and of ours."""
    networks, batches = (3, 15) if options.quick else (5, 20)
    classes = len(pictures.class_names)
    mean, deviation = MEAN_AND_DEVIATION.get(setting.data, ([0.0], [1.0]))
    images = (pictures.images - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    images, labels = images.to(options.device), pictures.labels.to(options.device)
    seen = len(images) // 2 if setting.trained else 0
    draw = generator(options, setting.batch)
    scores: dict[str, list[tuple[float, ...]]] = {"method": [], "ours": []}
    for network in range(networks):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + network)
            model = setting.network().to(options.device)
        train_(model, images[:seen], labels[:seen], setting.trained, draw)
        function = LossGradient(model, nn.CrossEntropyLoss())
        weight, bias = list(model.parameters())[-2:]
        for _ in range(batches):
            if setting.replacement:
                chosen = torch.randint(len(images), (setting.batch,), generator=draw)
            else:
                chosen = seen + torch.randperm(len(images) - seen, generator=draw)[: setting.batch]
            chosen = chosen.to(options.device)
            *_, w_grad, b_grad = function(images[chosen], labels[chosen]).values()
            true = count_labels(labels[chosen], classes)
            published = restore_label_counts(w_grad, b_grad, weight, bias, setting.batch, refinements=0)
            ours = restore_label_counts(w_grad, b_grad, weight, bias, setting.batch)
            as_published = class_by_class(published.solution, setting.batch)
            for name, counts in (("method", as_published), ("ours", ours.counts)):
                score = label_recovery(counts, true)
                scores[name].append((score.le_acc, score.ln_acc, score.i_rec))
    row: dict[str, object] = {"setting": setting.name, "batch": setting.batch}
    means = {name: np.mean(values, axis=0) for name, values in scores.items()}
    for index, metric in enumerate(METRICS):
        row[f"{metric} published"] = setting.published[index] if setting.published else None
        row[f"{metric} method"] = round(float(means["method"][index]), 4)
        row[f"{metric} ours"] = round(float(means["ours"][index]), 4)
    row["least margin"] = (
        round(float(min(means["ours"] - np.array(setting.published))), 4) if setting.published else None
    )
    row["trained"] = setting.trained
    row["drawn"] = "with replacement" if setting.replacement else "without replacement"
    row["batches"] = networks * batches
    return row


def class_by_class(solution: Tensor, batch_size: int) -> Tensor:
    """The authors' rounding: each class by itself, negative and impossible counts dropped, any sum."""
    counts = solution.clamp_min(0).round()
    return torch.where(counts <= batch_size, counts, torch.zeros_like(counts))


def compact(row: dict[str, object]) -> dict[str, object]:
    """A row for a terminal: three numbers per column."""

    def three(which: str) -> str:
        values = [row[f"{metric} {which}"] for metric in METRICS]
        return "/".join(short(v) for v in values)

    columns = {"published": "published", "method": "its method here", "ours": "ILRG()"}
    cells = {heading: three(which) for which, heading in columns.items()}
    return {"setting": row["setting"], "batch": row["batch"], **cells, "least margin": row["least margin"]}


def short(value: object) -> str:
    """Three digits without the zeros that say nothing: 1, .994."""
    return f"{value:.3f}".rstrip("0").rstrip(".").lstrip("0") or "0" if isinstance(value, int | float) else "-"


# ---------------------------------------------------------------------- how long it takes


def plain_counts(
    weight_gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor, batch_size: int
) -> Tensor:
    """The published method class by class and element by element: the same numbers, the slow way."""
    classes = len(bias)
    probabilities = []
    for c in range(classes):
        slope = bias_gradient[c].item()
        embedding = torch.tensor([w / slope for w in weight_gradient[c].tolist()], dtype=torch.float64)
        probabilities.append((weight @ embedding + bias).softmax(0))
    coefficients = [[1.0] * classes]
    values = [float(batch_size)]
    for i in range(classes):
        coefficients.append([probabilities[j][i].item() - (1.0 if i == j else 0.0) for j in range(classes)])
        values.append(batch_size * bias_gradient[i].item())
    return torch.from_numpy(np.linalg.pinv(np.array(coefficients)) @ np.array(values))


def speed(options: argparse.Namespace) -> dict[str, float]:
    """One restoration of 4,096 labels among 1,000 classes from 2,048 features, against the plain form.

    Features as an untrained ReLU network gives them: a pattern that all examples share, and a little of their own.
    """
    classes, features, batch = 1000, 2048, 4096
    draw = generator(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = nn.Linear(features, classes)
    weight, bias = head.weight.detach(), head.bias.detach()
    own = 0.06 * torch.randn(batch, features, generator=draw)
    embeddings = (torch.rand(features, generator=draw) + own).relu()
    labels = torch.randint(classes, (batch,), generator=draw)
    slopes = ((embeddings @ weight.T + bias).softmax(1) - one_hot(labels, classes)) / batch
    w_grad, b_grad, w, b = (t.to(options.device) for t in (slopes.T @ embeddings, slopes.sum(0), weight, bias))
    w_grad_host, b_grad_host, w_host, b_host = (t.cpu().double() for t in (w_grad, b_grad, w, b))

    def published() -> Tensor:
        return restore_label_counts(w_grad, b_grad, w, b, batch, refinements=0).solution

    def plain() -> Tensor:
        return plain_counts(w_grad_host, b_grad_host, w_host, b_host, batch)

    def ours() -> Tensor:
        return restore_label_counts(w_grad, b_grad, w, b, batch).counts

    repeats = 1 if options.quick else 3
    times = paired_times(published, plain, repeats=repeats, device=options.device)
    default = paired_times(ours, plain, repeats=repeats, device=options.device)
    # The machine's neighbours only ever add to a time.
    least = min(seconds(ours, device=options.device)[1] for _ in range(5))
    true = count_labels(labels, classes)
    return {
        "classes": classes,
        "features": features,
        "batch": batch,
        "seconds, published method": times.ours,
        "seconds, plain form": times.reference,
        "times faster than the plain form, published method": times.ratio,
        "seconds, ILRG()": default.ours,
        "seconds, ILRG(), least of 5": least,
        "times faster than the plain form, ILRG()": default.ratio,
        "largest difference in counts": (published().cpu() - plain()).abs().max().item(),
        "LnAcc, published method": label_recovery(class_by_class(published().cpu(), batch), true).ln_acc,
        "LnAcc, ILRG()": label_recovery(ours().cpu(), true).ln_acc,
    }


# ---------------------------------------------------------------------- all of it


def main() -> None:
    """Run the rows, then the timing."""
    options = benchmark_parser(__doc__).parse_args()
    found = {name: real_pictures(options, name) for name in ("mnist_2000", "cifar100_400")}
    real = found["mnist_2000"] is not None
    data: dict[str, Pictures | None] = {**found, "digits": digits()}
    rows = [recovery(s, pictures, options) for s in settings(real) if (pictures := data[s.data]) is not None]
    timing = speed(options)
    bars = [
        Bar(
            f"{row['setting']}, batch {row['batch']}: least margin over the paper",
            margin,
            -5e-4,
            "at least",
        )
        for row in rows
        if isinstance(margin := row["least margin"], float) and not row["trained"]
    ]
    bars += [
        Bar("seconds of ILRG(), least of 5", timing["seconds, ILRG(), least of 5"], 1.0, "at most"),
        Bar(
            "published method: times faster than its plain form",
            timing["times faster than the plain form, published method"],
            10.0,
            "at least",
        ),
        Bar("largest difference from the plain form (counts)", timing["largest difference in counts"], 1e-6, "at most"),
    ]
    tables = [
        rows_table("LeAcc/LnAcc/IRec", [compact(row) for row in rows]),
        rows_table("One restoration", [{"figure": name, "value": value} for name, value in timing.items()]),
    ]
    finish(options, figures={"recovery": rows, "speed": [timing]}, bars=bars, tables=tables)


if __name__ == "__main__":
    main()
