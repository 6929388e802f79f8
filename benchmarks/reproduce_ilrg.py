"""Label restoration, row by row beside iLRG's published table: untrained, trained, noisy and sparsified.

LeAcc/LnAcc/IRec as published (Ma et al., ICLR 2023), of the published method as run here (counts rounded class by
class, as the authors do), of `ILRG()` and, where the model is trained or the gradient changed, of `LabelSystem()`. The
head's gradient is computed in float32 from features in eval mode, which equals the whole model's. Features of all
pictures of a slice are computed once, and batches drawn from them: MNIST 2,000 pictures, CIFAR-100 400 (batches of 32
and more with replacement), without replacement otherwise. ImageNet's rows: 1,000 Tiny ImageNet pictures at 64x64
through the 224x224 architectures, picture `i` taken as class `i` of 1,000, drawn with replacement. PyTorch's default
initialisation (LeNet-5: convolutions Kaiming-normal). 50 batches a row, ten on each of five networks for FCN and
LeNet-5; trained rows and those of 1,000 classes take fewer under --quick (the column says). Noise: normal with that
standard deviation; sparsified: that share of the smallest elements of each tensor set to 0. RLG runs on the first
batches of a network only, and so does `LabelSystem` where the model is untrained.

Trained rows are on other data than the paper's and no like-for-like comparison: FCN-3 on 1,000 MNIST pictures (SGD,
Nesterov, learning rate 0.1, batch 128), ResNet-18 of width 32 and VGG-16 with batch normalisation on 300 CIFAR-100
pictures (learning rate 0.05 and 0.01, batch 64, flips). Batches come from the training pictures ("seen") or from the
others ("unseen"). Weights are kept in benchmarks/checkpoints; under --quick networks of more than 10 epochs are skipped
unless they lie there.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from common import FOLDER, Bar, benchmark_parser, finish, generator, real_pictures, rows_table
from gradguard.attacks._labels.baselines import gi_counts, llg_counts, llg_statistics, rlg_counts
from gradguard.attacks._labels.counts import restore_label_counts
from gradguard.attacks._labels.system import solve_label_system
from gradguard.leakage.labels import count_labels, label_recovery
from gradguard.zoo.models import fcn, resnet, vgg
from gradguard.zoo.pictures import Pictures, digits

CHECKPOINTS = FOLDER / "checkpoints"
Numbers = tuple[float, float, float]
#: Per channel, as the authors normalise.
SCALE = {
    "mnist_2000": ([0.13066], [0.30811]),
    "cifar100_400": ([0.50716, 0.48669, 0.44120], [0.26733, 0.25644, 0.27615]),
    "tiny_imagenet_1000": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclass(frozen=True)
class Row:
    """A row of the paper. `trained`: epochs (FCN-3: iterations); `pictures`: all, seen or unseen."""

    network: str
    data: str
    make: Callable[[], nn.Module]
    batch: int
    published: Numbers | None
    networks: int = 1
    trained: int = 0
    pictures: str = "all"
    noise: float = 0.0
    sparse: float = 0.0


def fully_connected(hidden: int = 1, features: int = 784) -> nn.Module:
    """The paper's FCN, with `hidden` hidden layers after the first."""
    return fcn((features, 300, *[300] * hidden, 10), activation="relu", bias=True)


def lenet5(activation: Callable[[], nn.Module]) -> nn.Module:
    """The paper's LeNet-5 for 32x32 RGB pictures."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 100)),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def vgg19() -> nn.Module:
    """VGG-19 for 32x32 pictures with one linear head."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 100))


def untrained_rows() -> Iterator[Row]:
    """In the order of REPRODUCTION's table."""
    mnist, cifar, imagenet = "mnist_2000", "cifar100_400", "tiny_imagenet_1000"
    for batch, numbers in {
        4: (1, 1, 1),
        8: (1, 1, 1),
        16: (1, 1, 1),
        24: (1, 0.994, 1),
        32: (0.982, 0.804, 0.975),
        64: (0.998, 0.598, 0.957),
        128: (1, 0.386, 0.963),
    }.items():
        yield Row("FCN-3", mnist, fully_connected, batch, numbers, networks=5)
    for hidden, numbers in {0: (0.988, 0.328, 0.887), 2: (1, 0.768, 0.975), 3: (1, 1, 1), 4: (1, 0.996, 1)}.items():
        yield Row(f"FCN-{hidden + 2}", mnist, functools.partial(fully_connected, hidden), 64, numbers, networks=5)
    for name, activation in (("ReLU", nn.ReLU), ("SiLU", nn.SiLU), ("LeakyReLU", nn.LeakyReLU)):
        yield Row(f"LeNet-5 {name}", cifar, functools.partial(lenet5, activation), 24, (1, 1, 1), networks=5)
    for batch, numbers in {
        32: (1, 1, 1),
        64: (1, 1, 1),
        128: (1, 1, 1),
        256: (1, 0.997, 1),
        512: (1, 0.960, 1),
        1024: (1, 0.851, 0.992),
    }.items():
        yield Row("LeNet-5 ReLU", cifar, functools.partial(lenet5, nn.ReLU), batch, numbers, networks=5)
    for depth, numbers in {11: (1, 0.993, 1), 13: (1, 0.995, 1), 16: (1, 1, 1)}.items():
        yield Row(f"VGG-{depth}", cifar, functools.partial(vgg, depth, num_classes=100), 1024, numbers)
    yield Row("VGG-19", cifar, vgg19, 1024, (1, 1, 1))
    large = functools.partial(resnet, num_classes=1000, large_inputs=True)
    for batch, numbers in {
        128: (1, 1, 1),
        512: (0.999, 0.999, 0.999),
        1024: (0.996, 0.994, 0.995),
        2048: (0.994, 0.989, 0.993),
        4096: (0.992, 0.982, 0.990),
    }.items():
        yield Row("ResNet-50", imagenet, functools.partial(large, 50), batch, numbers)
    for depth, numbers in {18: (0.997, 0.978, 1), 34: (0.999, 0.998, 0.999), 101: (1, 1, 1), 152: (1, 1, 1)}.items():
        yield Row(f"ResNet-{depth}", imagenet, functools.partial(large, depth), 2048, numbers)
    small = functools.partial(resnet, 18, num_classes=100)
    yield Row("VGG-16", cifar, functools.partial(vgg, 16, num_classes=100), 64, (1, 1, 1))
    yield Row("ResNet-18", cifar, small, 24, (1, 1, 1), noise=1e-4)
    yield Row("ResNet-18", cifar, small, 24, (1, 1, 1), noise=1e-3)
    yield Row("ResNet-18", cifar, small, 24, (0.980, 0.973, 0.985), noise=1e-2)
    yield Row("ResNet-18", cifar, small, 24, (0.990, 0.989, 1), sparse=0.1)
    yield Row("ResNet-18", cifar, small, 24, (0.986, 0.984, 1), sparse=0.4)
    yield Row("ResNet-18", cifar, small, 24, (0.960, 0.957, 0.902), sparse=0.8)


def trained_rows() -> Iterator[Row]:
    """The trained rows, each for seen and unseen pictures."""
    narrow = functools.partial(resnet, 18, num_classes=100, width=32)
    deep = functools.partial(vgg, 16, num_classes=100, normalised=True)
    rows = [
        Row("FCN-3", "mnist_2000", fully_connected, 8, (0.745, 0.555, 0.613), trained=100),
        Row("FCN-3", "mnist_2000", fully_connected, 8, (0.645, 0.485, 0.450), trained=1000),
        Row("ResNet-18 w32", "cifar100_400", narrow, 24, (0.921, 0.891, 0.678), trained=10),
        Row("ResNet-18 w32", "cifar100_400", narrow, 24, (0.852, 0.822, 0.301), trained=100),
        Row("VGG-16 BN", "cifar100_400", deep, 64, (0.805, 0.722, 0.588), trained=10),
        Row("VGG-16 BN", "cifar100_400", deep, 64, (0.811, 0.722, 0.608), trained=40),
        Row("VGG-16 BN", "cifar100_400", deep, 64, (0.656, 0.567, 0.280), trained=100),
    ]
    for row in rows:
        yield replace(row, pictures="seen")
        yield replace(row, pictures="unseen")


# ---------------------------------------------------------------------- pictures, training, features


def normalised(pictures: Pictures, data: str) -> tuple[Tensor, Tensor]:
    """Images and labels as the networks take them."""
    mean, deviation = SCALE.get(data, ([0.0], [1.0]))
    images = (pictures.images - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    labels = torch.arange(len(images)) if data == "tiny_imagenet_1000" else pictures.labels
    return images, labels


def unseen_mask(labels: Tensor, data: str) -> Tensor:
    """Which pictures are kept from training: MNIST's second half; of CIFAR-100 the first picture of each class."""
    if data == "mnist_2000":
        return torch.arange(len(labels)) >= len(labels) // 2
    earlier = (labels[:, None] == labels[None]).tril(-1).any(1)
    return ~earlier


def trained_network(
    row: Row, images: Tensor, labels: Tensor, options: argparse.Namespace, seed: int
) -> nn.Module | None:
    """The row's network, trained on what is not unseen; from the checkpoints where it lies there."""
    torch.manual_seed(seed)
    model = row.make()
    if row.trained == 0:
        return model.to(options.device).eval()
    name = f"{row.network}-{row.trained}-seed{seed}.pt".replace(" ", "-").lower()
    path = CHECKPOINTS / name
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.to(options.device).eval()
    iterations = row.network == "FCN-3"
    if options.quick and not iterations and row.trained > 10:
        print(f"No {path.name} in benchmarks/checkpoints: skipped under --quick.", file=sys.stderr)
        return None
    seen = ~unseen_mask(labels, row.data)
    model = model.to(options.device)
    train_(model, images[seen].to(options.device), labels[seen].to(options.device), row)
    CHECKPOINTS.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def train_(model: nn.Module, images: Tensor, labels: Tensor, row: Row) -> None:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4, as the authors; rates as the script's docstring says."""
    rate = {"FCN-3": 0.1, "VGG-16 BN": 0.01}.get(row.network, 0.05)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    draw = torch.Generator().manual_seed(0)
    model.train()

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimiser.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimiser.step()

    if row.network == "FCN-3":
        for _ in range(row.trained):
            chosen = torch.randint(len(images), (128,), generator=draw)
            step(images[chosen], labels[chosen])
        return
    for _ in range(row.trained):
        order = torch.randperm(len(images), generator=draw)
        for place in range(0, len(images) - 32, 64):
            chosen = order[place : place + 64]
            flip = (torch.rand(len(chosen), generator=draw) < 0.5).to(images.device)
            inputs = images[chosen]
            step(torch.where(flip[:, None, None, None], inputs.flip(3), inputs), labels[chosen])


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """What the head takes in, `(N, m)`, in chunks."""
    body = model[:-1]  # type: ignore[index]
    return torch.cat([body(chunk.to(device)) for chunk in images.split(50)])


# ---------------------------------------------------------------------- one row


def measured(row: Row, pools: list[tuple[Tensor, ...]], options: argparse.Namespace) -> dict:
    """`pools`: features, labels, head weight, head bias, features of random inputs, per network."""
    batches = 50 // len(pools)
    with_system = bool(row.trained or row.noise or row.sparse)
    if row.trained and options.quick:
        batches = {"FCN-3": 20, "ResNet-18 w32": 10, "VGG-16 BN": 2}[row.network]
    elif row.data == "tiny_imagenet_1000" and options.quick:
        batches = 5
    draw = generator(options, row.batch)
    scores: dict[str, list[Numbers]] = {}
    cheap = len(pools[0][3]) <= 100 and row.batch <= 64
    for features, labels, weight, bias, random in pools:
        classes = len(bias)
        impact, offsets = llg_statistics(random, weight, bias, row.batch)
        for index in range(batches):
            again = row.batch > len(features) or (row.data != "mnist_2000" and row.batch >= 32 and not row.trained)
            if again or row.data == "tiny_imagenet_1000":
                chosen = torch.randint(len(features), (row.batch,), generator=draw)
            else:
                chosen = torch.randperm(len(features), generator=draw)[: row.batch]
            e, y = features[chosen], labels[chosen]
            slopes = ((e @ weight.T + bias).softmax(1) - one_hot(y, classes)) / row.batch
            w_grad, b_grad = (changed(g, row, draw) for g in (slopes.T @ e, slopes.sum(0)))
            sent = (w_grad, b_grad, weight, bias, row.batch)
            published = restore_label_counts(*sent, refinements=0).solution
            answers = {"method": class_by_class(published, row.batch), "ILRG": restore_label_counts(*sent).counts}
            if with_system and (row.trained or index < 5):
                answers["LabelSystem"] = solve_label_system(*sent, nonnegative=True).counts
            answers["iDLG"] = (b_grad < 0).long()
            answers["GI"] = gi_counts(w_grad, row.batch)
            answers["LLG"] = llg_counts(w_grad, row.batch)
            if impact < 0:  # not for features that are negative on average
                answers["LLG*"] = llg_counts(w_grad, row.batch, impact=impact, offsets=offsets)
            if cheap and index < 3:
                answers["RLG"] = rlg_counts(w_grad, row.batch)
            true = count_labels(y, classes)
            for name, counts in answers.items():
                score = label_recovery(counts, true)
                scores.setdefault(name, []).append((score.le_acc, score.ln_acc, score.i_rec))
    means = {name: tuple(np.mean(values, axis=0)) for name, values in scores.items()}
    ours = "LabelSystem" if row.trained else "ILRG"
    margin = None
    if row.published is not None:
        margin = float(min(np.array(means[ours]) - np.array(row.published)))
    change = f"noise {row.noise:g}" if row.noise else f"sparse {row.sparse:.0%}" if row.sparse else ""
    return {
        "network": row.network,
        "trained": row.trained,
        "pictures": row.pictures,
        "change": change,
        "batch": row.batch,
        "batches": batches * len(pools),
        "published": short(row.published),
        "method": short(means["method"]),
        "ILRG": short(means["ILRG"]),
        "LabelSystem": short(means.get("LabelSystem")),
        "least difference": None if margin is None else round(margin, 4),
        **{name: short(means[name][2:]) if name in means else "-" for name in ("iDLG", "GI", "RLG", "LLG", "LLG*")},
        "IRec method": float(means["method"][2]),
        "IRec ours": float(means[ours][2]),
    }


def changed(gradient: Tensor, row: Row, draw: torch.Generator) -> Tensor:
    """With the row's noise, or without its smallest elements."""
    if row.noise:
        gradient = gradient + row.noise * torch.randn(gradient.shape, generator=draw).to(gradient)
    if row.sparse:
        limit = gradient.abs().flatten().kthvalue(max(1, int(row.sparse * gradient.numel()))).values
        gradient = torch.where(gradient.abs() > limit, gradient, torch.zeros_like(gradient))
    return gradient


def class_by_class(solution: Tensor, batch_size: int) -> Tensor:
    """The authors' rounding: each class by itself, negative and impossible counts dropped, any sum."""
    counts = solution.clamp_min(0).round()
    return torch.where(counts <= batch_size, counts, torch.zeros_like(counts))


def short(numbers: Any) -> str:
    """Three digits without the zeros that say nothing: 1/.994/1."""
    if numbers is None:
        return "-"
    return "/".join(f"{v:.3f}".rstrip("0").rstrip(".").lstrip("0") or "0" for v in numbers)


# ---------------------------------------------------------------------- all of it


def main() -> None:
    """Run the rows; features of a network are computed once for all rows in a sequence that need them."""
    options = benchmark_parser(__doc__).parse_args()
    data = {name: real_pictures(options, name) for name in SCALE}
    rows: list[dict] = []
    key, pools = None, None
    wanted = [*untrained_rows(), *trained_rows()]
    if data["mnist_2000"] is None:
        data = {"digits": digits()}
        wanted = [
            Row("FCN-3", "digits", functools.partial(fully_connected, 1, 64), b, None, networks=5) for b in (8, 24, 64)
        ]
    for row in wanted:
        pictures = data.get(row.data)
        if pictures is None:
            continue
        if key != (row.network, row.data, row.trained, row.pictures):
            key = (row.network, row.data, row.trained, row.pictures)
            pools = pools_of(row, pictures, options)
        if pools is not None:
            rows.append(measured(row, pools, options))
            print({k: rows[-1][k] for k in ("network", "trained", "pictures", "change", "batch")}, file=sys.stderr)
    untrained, trained = ([r for r in rows if bool(r["trained"]) == t] for t in (False, True))
    bars = [
        Bar(f"{title(r)}: least difference from the paper", r["least difference"], -0.01, "at least")
        for r in untrained
        if r["least difference"] is not None
    ]
    for r in trained:
        gained = (r["IRec ours"] - r["IRec method"]) / max(1 - r["IRec method"], 1e-9)
        bars.append(Bar(f"{title(r)}: share of iLRG's missing IRec that is gained", gained, 0.5, "at least"))
        if r["network"].startswith("ResNet-18"):
            bars.append(Bar(f"{title(r)}: IRec", r["IRec ours"], 0.9, "at least"))
    hidden = ("IRec method", "IRec ours")
    shown = [{k: v for k, v in r.items() if k not in hidden} for r in rows]
    finish(options, figures={"rows": rows}, bars=bars, tables=[rows_table("LeAcc/LnAcc/IRec", shown)])


def title(row: dict) -> str:
    """A row's name in a bar."""
    words = [row["network"], f"batch {row['batch']}", row["change"]]
    if row["trained"]:
        words += [f"trained {row['trained']}", row["pictures"]]
    return ", ".join(w for w in words if w)


def pools_of(row: Row, pictures: Pictures, options: argparse.Namespace) -> list[tuple[Tensor, ...]] | None:
    """Features, labels and head of each of the row's networks."""
    images, labels = normalised(pictures, row.data)
    pools = []
    for network in range(row.networks):
        model = trained_network(row, images, labels, options, options.seed + network)
        if model is None:
            return None
        kept = torch.ones_like(labels, dtype=torch.bool)
        if row.pictures != "all":
            kept = unseen_mask(labels, row.data) == (row.pictures == "unseen")
        head = model[-1]  # type: ignore[index]
        pool = (labels[kept].to(options.device), head.weight.detach(), head.bias.detach())
        noise = torch.randn(64, *images.shape[1:], generator=generator(options))
        random = features_of(model, noise, options.device)
        pools.append((features_of(model, images[kept], options.device), *pool, random))
    return pools


if __name__ == "__main__":
    main()
