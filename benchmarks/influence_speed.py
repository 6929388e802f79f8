"""How fast and how large: influence against the published method, the callback in a training loop, growth, precision.

The published method (`published_i2f.py`) is SciPy's `eigsh` in parameter space for `lambda_max`, two double backward
passes per product, and gradient descent for the exact form. "Equal accuracy": each `lambda_max` within 1e-3 of one
that Lanczos found to 1e-6. The steps of gradient descent are counted from the singular values of `J` and timed on a
few (it would need hours). Both ways take turns in one process; ratios are medians over pairs. Peak memory is that of a
process of its own above what the model takes. `--part` runs one part; ResNet-18 is for 32x32 pictures, eval mode.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import (
    Bar,
    benchmark_parser,
    finish,
    generator,
    paired_times,
    peak_memory,
    real_pictures,
    rows_table,
    seconds,
)
from gradguard import Guard, InputJacobian, LossGradient
from gradguard.defenses import GaussianNoise
from gradguard.functional.vectors import flatten
from gradguard.leakage import InfluenceBound, influence, influence_lower_bound
from gradguard.linalg import largest_eigenvalue
from gradguard.zoo.models import lenet, resnet, uniform_init_
from gradguard.zoo.pictures import Pictures, photos
from published_i2f import PlainJacobian, gradient_descent, gradient_descent_iterations, lower_bound

PARTS = ("products", "bound", "exact", "memory", "callback", "growth", "precision")
LOSS = nn.CrossEntropyLoss()


def main() -> None:
    """Run the parts asked for."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    for part in options.part or PARTS:
        rows, promised = globals()[f"{part}_part"](options)
        figures |= rows
        bars += promised
    finish(options, figures=figures, bars=bars, tables=[rows_table(n, r) for n, r in figures.items()])


# ---------------------------------------------------------------------- subjects


def colour_pictures(options: argparse.Namespace, count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """`count` pictures and labels, real ones where they are at hand, on the device."""
    found: Pictures | None = real_pictures(options, "cifar10_2000")
    if found is None:
        found = photos(32)
    index = torch.arange(count) % len(found)
    images = found.images[index]
    if size != 32:
        images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.to(options.device), found.labels[index].to(options.device)


def made(options: argparse.Namespace, make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode, the same for the same seed."""
    torch.manual_seed(options.seed)
    return make().eval().to(options.device)


def noise(model: nn.Module, options: argparse.Namespace) -> dict[str, Tensor]:
    """A perturbation of the gradient."""
    drawn = generator(options, 1)
    return {n: 1e-3 * torch.randn(p.shape, generator=drawn).to(p) for n, p in model.named_parameters()}


# ---------------------------------------------------------------------- parts


def bound_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """The lower bound on ResNet-18: one example, and per example of a batch of 32."""
    model = made(options, resnet)
    x, y = colour_pictures(options, 32)
    delta = noise(model, options)
    flat, function = flatten(delta), LossGradient(model, LOSS)

    def ours(count: int, confidence: float | None, chunk_size: int | None, tolerance: float) -> InfluenceBound:
        jacobian = InputJacobian(function, x[:count], y[:count], chunk_size=chunk_size)
        return influence_lower_bound(
            jacobian, delta, tolerance=tolerance, confidence=confidence, generator=generator(options)
        )

    def plain() -> tuple[float, float]:
        return lower_bound(PlainJacobian(model, LOSS, x[:1], y[:1]), flat, tolerance=1e-3, seed=options.seed)

    # Without a confidence the rule is ARPACK's, a residual; 0.02 is the loosest that is right to 1e-3 here.
    cases: dict[str, tuple[int, float | None, int | None, float]] = {
        "one example, to a residual": (1, None, None, 0.02),
        "one example, sure to 0.999": (1, 0.999, None, 0.1),
        "batch of 32, per example, to a residual": (32, None, 16, 0.02),
        "batch of 32, per example, sure to 0.999": (32, 0.999, 16, 0.1),
    }
    truth = {1: ours(1, 0.999, None, 1e-3).lambda_max, 32: ours(32, 0.999, 16, 1e-3).lambda_max}
    # One example of the published method stands for the batch: it has no batched form.
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    found = {}
    for _ in range(1 if options.quick else 3):
        published, reference = seconds(plain, device=options.device)
        for name, (count, confidence, chunk, tolerance) in cases.items():
            found[name] = seconds(partial(ours, count, confidence, chunk, tolerance), device=options.device)
            ratios[name].append(reference * count / found[name][1])
    rows: list[dict[str, Any]] = []
    for name, (count, *_) in cases.items():
        bound, elapsed = found[name]
        rows.append(
            {
                "case": name,
                "products": bound.iterations,
                "error_of_lambda_max": float((bound.lambda_max / truth[count] - 1).abs().max()),
                "published_error": abs(published[1] / float(truth[1]) - 1),
                "seconds_per_example": elapsed / count,
                "published_seconds": reference,
                "ratio": statistics.median(ratios[name]),
            }
        )
    one, _, batch, _ = (r["ratio"] for r in rows)
    # Those that are sure promise a tenth, and are mostly far closer.
    worst = max(r["error_of_lambda_max"] for r in rows if "residual" in r["case"])
    cuda = options.device.type == "cuda"
    bars = [
        Bar("ResNet-18 bound, one example, times faster", one, 50.0 if cuda else 15.0, "at least"),
        Bar("ResNet-18 bound to a residual, largest relative error of lambda_max", worst, 1e-3, "at most"),
    ]
    if not cuda:
        bars.append(Bar("ResNet-18 bound, per example of 32, times faster", batch, 40.0, "at least"))
    return {"bound": rows}, bars


def exact_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """The exact form on the LeNet."""
    pictures = real_pictures(options, "mnist_2000") or None
    images = (
        pictures.images[:1] if pictures else nn.functional.interpolate(photos(28).images[:1].mean(1, True), size=28)
    )
    x, y = images.double().to(options.device), torch.zeros(1, dtype=torch.int64, device=options.device)
    rows: list[dict[str, Any]] = []
    for name, make in {
        "LeNet, sigmoid, uniform": lambda: uniform_init_(lenet()),
        "LeNet, ReLU": lambda: lenet(activation="relu"),
    }.items():
        model = made(options, make).double()
        function, delta = LossGradient(model, LOSS), noise(model, options)
        flat = flatten(delta)
        dense = InputJacobian(function, x, y).dense()[0]
        _, singular, right = torch.linalg.svd(dense, full_matrices=False)
        coefficients = (right @ flat) / singular
        iterations = gradient_descent_iterations(singular.cpu(), coefficients.cpu(), 1e-3)
        step = 1 / float(singular[0]) ** 2
        plain, few = PlainJacobian(model, LOSS, x, y), 20
        true = float(coefficients.norm())
        for method in ("lanczos", "dense"):
            ours = partial(exact_form, function, x, y, delta, method)
            error = abs(float(ours()) / true - 1)
            descent = partial(gradient_descent, plain, flat, step, few)
            times = paired_times(ours, descent, device=options.device)
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "relative_error": error,
                    "seconds": times.ours,
                    "condition_number": float(singular[0] / singular[-1]),
                    "descent_steps": iterations,
                    "descent_seconds_per_step": times.reference / few,
                    "ratio": times.ratio * iterations / few,
                }
            )
    best = max(r["ratio"] for r in rows if r["model"] == "LeNet, sigmoid, uniform")
    worst = max(r["relative_error"] for r in rows)
    return {"exact": rows}, [
        Bar("exact form on the paper's LeNet, times faster than gradient descent", best, 500.0, "at least"),
        Bar("exact form on LeNet, largest relative error", worst, 1e-3, "at most"),
    ]


def products_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """One product `J J^T u` layer by layer against `torch.func`, and against a training step."""
    model = made(options, resnet)
    rows: list[dict[str, Any]] = []
    for count, per_example in ((1, True), (8, True), (8, False)):
        x, y = colour_pictures(options, count)
        function, u = LossGradient(model, LOSS), torch.randn(x.shape, generator=generator(options)).to(x)
        fast, slow = (InputJacobian(function, x, y, per_example=per_example) for _ in range(2))
        slow.way = "forward over reverse"

        def step(x: Tensor = x, y: Tensor = y) -> None:
            model.zero_grad()
            LOSS(model(x), y).backward()

        against = paired_times(
            partial(fast.gram, u), partial(slow.gram, u), repeats=2 if options.quick else 5, device=options.device
        )
        training = paired_times(partial(fast.gram, u), step, device=options.device)
        gap = (fast.gram(u) - slow.gram(u)).norm() / slow.gram(u).norm()
        rows.append(
            {
                "operator": f"{'per example' if per_example else 'joint'}, batch {count}",
                "seconds_per_example": against.ours / count,
                "times_faster_than_torch_func": against.ratio,
                "training_steps": 1 / training.ratio,
                "difference": float(gap),
            }
        )
    return {"products": rows}, []


def exact_form(function: LossGradient, x: Tensor, y: Tensor, delta: dict[str, Tensor], method: Any) -> Tensor:
    """I2F of one picture from nothing, to about 1e-3."""
    return influence(InputJacobian(function, x, y), delta, method=method, tolerance=1e-3).value


def memory_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Peak memory above the model's own, each in a process of its own."""
    cases = {
        "training step, batch 32": ("step", 32, None),
        "joint operator's product, batch 32": ("joint", 32, None),
        "per example, batch 32, all at once": ("each", 32, None),
        "per example, batch 32, chunks of 4": ("each", 32, 4),
        "per example, batch 32, through torch.func": ("functional", 32, None),
        "lower bound of one example": ("bound", 1, None),
        "published method, one example": ("published", 1, None),
    }
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    for name, (kind, count, chunk) in cases.items():
        with context.Pool(1) as pool:
            mebibytes = pool.apply(_peak_memory, (options, kind, count, chunk))
        rows.append({"case": name, "MiB": mebibytes})
    peak = {r["case"]: r["MiB"] for r in rows}
    ratio = peak["joint operator's product, batch 32"] / peak["training step, batch 32"]
    for row in rows:
        row["of_a_training_step"] = row["MiB"] / peak["training step, batch 32"]
    return {"memory": rows}, [Bar("memory of the joint operator over a training step's", ratio, 3.0, "at most")]


def _peak_memory(options: argparse.Namespace, kind: str, count: int, chunk: int | None) -> float:
    """MiB above what was used before; in a process of its own."""
    model = made(options, resnet)
    x, y = colour_pictures(options, count)
    with torch.no_grad():
        model(x[:1])
    function = LossGradient(model, LOSS)
    u = torch.randn_like(x)

    def steps() -> None:
        # Momentum is what an optimiser keeps; the model's gradient is the step's.
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimiser.zero_grad()
            LOSS(model(x), y).backward()
            optimiser.step()

    def products() -> None:
        jacobian = InputJacobian(function, x, y, per_example=kind != "joint", chunk_size=chunk, validate=False)
        if kind == "functional":
            jacobian.way = "forward over reverse"
        if chunk is None:
            jacobian.gram(u)
        else:
            influence_lower_bound(jacobian, noise(model, options), max_iterations=2)

    def bound() -> None:
        influence_lower_bound(InputJacobian(function, x, y), noise(model, options))

    def published() -> None:
        lower_bound(PlainJacobian(model, LOSS, x, y), flatten(noise(model, options)), tolerance=1e-3, seed=0)

    kinds = {"step": steps, "joint": products, "each": products, "functional": products, "bound": bound}
    return peak_memory(kinds.get(kind, published), device=options.device)


def callback_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Step time of a Lightning training loop with the callback over that without it."""
    import lightning.pytorch as pl

    from gradguard.integrations.lightning import GradGuard

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = colour_pictures(options, 256)
    data = torch.utils.data.TensorDataset(x.cpu(), y.cpu())
    width = 64

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = resnet(width=width), nn.CrossEntropyLoss()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss_fn(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.start = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = self.now()

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(self.now() - self.start)

        def now(self) -> float:
            if options.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

    def step_times(callback: pl.Callback | None, steps: int, skip: int) -> list[float]:
        torch.manual_seed(options.seed)
        clock = Clock()
        trainer = pl.Trainer(
            max_steps=steps + skip,
            accelerator="gpu" if options.device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, *([callback] if callback else [])],
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))
        return clock.times[skip:]

    steps = (6 if options.quick else 10) if options.device.type == "cpu" else 100
    # At the defaults there is no defense, and 49 steps of 50 are not measured: the mean over 50 is put together from
    # both kinds. What a defense itself costs (Gaussian noise is drawn in float64) is a row of its own.
    loose: dict[str, Any] = {"every_n_steps": 1, "tolerance": 0.5, "confidence": None}
    settings: dict[str, tuple[Guard, dict[str, Any]]] = {
        "not measured": (Guard(train_mode="eval"), {}),
        "bound of 4 examples every step, from the step before": (Guard(train_mode="eval"), loose),
        "bound of 4 examples every step, sure to 0.999": (Guard(train_mode="eval"), {"every_n_steps": 1}),
        "Gaussian noise, not measured": (Guard(defense=GaussianNoise(noise_ratio=0.3), train_mode="eval"), {}),
    }
    rows: list[dict[str, Any]] = []
    median = statistics.median
    without = [median(step_times(None, steps, 3))]
    found: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(1 if options.quick else 3):
        for name, (guard, setting) in settings.items():
            # The first three measurements also compare the step's gradient with the library's own.
            found[name].append(median(step_times(GradGuard(guard, **setting), steps, 4)))
        without.append(median(step_times(None, steps, 3)))
    base = median(without)
    for name, times in found.items():
        rows.append({"setting": name, "step_seconds": median(times), "ratio": median(times) / base})
    alone, cheap, sure, _ = (r["ratio"] for r in rows)
    rows.append({"setting": "defaults: sure bound every 50 steps, mean step", "ratio": (49 * alone + sure) / 50})
    rows.append({"setting": f"without (ResNet-18 of width {width}, batch 64)", "step_seconds": base, "ratio": 1.0})
    return {"callback": rows}, [
        Bar("callback, median step at the defaults over without", alone, 1.10, "at most"),
        Bar("callback, mean step at the defaults over without", (49 * alone + sure) / 50, 1.10, "at most"),
        Bar("callback, bound of 4 examples every step over without", cheap, 1.5, "at most"),
    ]


def growth_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Seconds of a product and of a bound against `D`, `P` and `B`, over a decade and more each."""
    repeats = 3 if options.quick else 7
    rows: list[dict[str, Any]] = []

    def measured(axis: str, value: int, model: nn.Module, x: Tensor, y: Tensor) -> None:
        jacobian = InputJacobian(LossGradient(model, LOSS), x, y)
        u, delta = torch.randn_like(x), noise(model, options)
        jacobian.gram(u)
        product = min(seconds(lambda: jacobian.gram(u), device=options.device)[1] for _ in range(repeats))

        def bound():
            fresh = InputJacobian(LossGradient(model, LOSS), x, y)
            return influence_lower_bound(fresh, delta, generator=generator(options))

        took, elapsed = seconds(bound, device=options.device)
        rows.append(
            {
                "axis": axis,
                "value": value,
                "seconds_of_a_product": product,
                "seconds_of_the_bound": elapsed,
                "products": took.iterations,
            }
        )

    for size in (16, 24, 32, 48, 64):
        x, y = colour_pictures(options, 1, size)
        model = made(options, lambda: resnet(10, width=16))
        measured("D", x[0].numel(), model, x, y)
    for width in (8, 16, 32, 64):
        x, y = colour_pictures(options, 1)
        model = made(options, lambda width=width: resnet(10, width=width))
        measured("P", sum(p.numel() for p in model.parameters()), model, x, y)
    for count in (1, 2, 4, 8, 16, 32):
        x, y = colour_pictures(options, count)
        measured("B", count, made(options, lambda: resnet(10, width=16)), x, y)
    exponents = []
    for axis in ("D", "P", "B"):
        some = [r for r in rows if r["axis"] == axis]
        values = np.log([r["value"] for r in some])
        fits = {
            n: float(np.polyfit(values, np.log([r[f"seconds_of_{n}"] for r in some]), 1)[0])
            for n in ("a_product", "the_bound")
        }
        decades = float((values.max() - values.min()) / math.log(10))
        exponents.append({"axis": axis, "decades": decades} | {f"exponent_of_{n}": v for n, v in fits.items()})
    return {"growth": rows, "exponents": exponents}, []


def precision_part(options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """What lower precision makes of a product, of `lambda_max` and of I2F, against float64."""
    pictures = real_pictures(options, "mnist_2000")
    grey = pictures.images[:4] if pictures else nn.functional.interpolate(photos(28).images.mean(1, True), size=28)
    grey, labels = grey.to(options.device), torch.arange(len(grey), device=options.device)
    colour, classes = colour_pictures(options, 4)
    cases: dict[str, tuple[Any, ...]] = {
        "LeNet, sigmoid, uniform": (lambda: uniform_init_(lenet()), grey, labels, 0.0),
        "ResNet-10 of width 8": (lambda: resnet(10, width=8), colour, classes, 1e-6),
    }
    rows: list[dict[str, Any]] = []
    for name, (make, x, y, damping) in cases.items():
        model = made(options, make)
        exact = InputJacobian(LossGradient(model, LOSS, dtype=torch.float64), x, y)
        delta, u = noise(model, options), torch.randn(x.shape, generator=generator(options, 3)).to(x)
        limit = None if damping == 0 else 150
        options_: dict[str, Any] = {"method": "lanczos", "damping": damping, "max_iterations": limit}
        truth = influence(exact, delta, **options_).value
        largest = largest_eigenvalue(exact.gram_operator(), tolerance=1e-3, generator=generator(options)).value
        product = exact.gram(u.double())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            jacobian = InputJacobian(LossGradient(model, LOSS, dtype=dtype), x, y)
            answer = jacobian.gram(u).double()
            lanczos = largest_eigenvalue(jacobian.gram_operator(), max_iterations=15, generator=generator(options))
            # The solver on products as they are, and what `influence` makes of the same operator.
            raw = _in_own_dtype(jacobian, delta, damping, limit)
            guarded = influence(jacobian, delta, **options_).value.double()
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "product_error": float((answer - product).norm() / product.norm()),
                    "lambda_max_error": float((lanczos.value.double() / largest - 1).abs().max()),
                    "i2f_error_in_dtype": float((raw / truth - 1).abs().max()),
                    "i2f_error_of_influence": float((guarded / truth - 1).abs().max()),
                }
            )
    worst = max(r["i2f_error_of_influence"] for r in rows if r["dtype"] == "float32")
    return {"precision": rows}, [Bar("error of influence() on a float32 model", worst, 1e-3, "at most")]


def _in_own_dtype(jacobian: InputJacobian, delta: dict[str, Tensor], damping: float, limit: int | None) -> Tensor:
    """I2F with float32 vectors and products in the operator's own dtype."""
    from gradguard.linalg import LinearOperator, lanczos_solve

    operator = jacobian.gram_operator()
    b = jacobian.matvec(delta).reshape(jacobian.num_problems, -1).float()

    def product(v: Tensor) -> Tensor:
        return operator.matvec(v.to(operator.like)).float()

    found = lanczos_solve(LinearOperator(product, product, operator.shape, b), b, damping=damping, max_iterations=limit)
    return found.solution.norm(dim=-1).double()


if __name__ == "__main__":
    main()
