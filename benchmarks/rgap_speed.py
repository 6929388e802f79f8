"""R-GAP's speed: CNN6 in float64 against the plain method, and against DLG at equal quality.

The plain method is the authors': it writes each layer's constraints into a dense float32 matrix entry by entry (padding
among the unknowns, with equations that say it is zero), solves it with NumPy's `lstsq`, and finds the scalar at the top
by 30,000 steps of Adam. It is timed on the layers that fit into
`--budget` seconds, smallest system first; the others are extrapolated, entries from the time per entry and solves from
that per `rows * columns^2`, both taken from the largest layer timed, and the rows of the table say which is which.
Peak memory is of a process of its own above what it holds before the attack.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import Bar, benchmark_parser, finish, generator, peak_memory, real_pictures, rows_table, seconds
from gradguard import LossGradient
from gradguard.attacks import DLG, RGAP, Observation
from gradguard.chain import Affine, walk
from gradguard.leakage import fidelity
from gradguard.zoo.models import cnn6, lenet
from gradguard.zoo.pictures import photos

LOSS = nn.BCEWithLogitsLoss()


def main() -> None:
    """Time both, and extrapolate what does not fit."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--budget", type=float, default=None, help="seconds for the plain method (default 300 or 900)")
    options = parser.parse_args()
    budget = options.budget or (300.0 if options.quick else 900.0)
    observation, picture = problem(options)
    ours, quality = [], 0.0
    for _ in range(7):
        found, elapsed = seconds(lambda: RGAP()(observation), device=options.device)
        ours.append(elapsed)
        quality = fidelity(found.inputs, picture).psnr.item()
    layers = plain_layers(observation, budget)
    scalar = plain_scalar(observation)
    plain = scalar + sum(r["fill_seconds"] + r["solve_seconds"] for r in layers)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_peak_memory, (options,))
    matching = against_dlg(options)
    summary = {
        "rgap_seconds": statistics.median(ours),
        "rgap_psnr": quality,
        "rgap_peak_MiB": peak,
        "plain_seconds": plain,
        "plain_scalar_seconds": scalar,
        "plain_largest_matrix_MiB": max(r["matrix_MiB"] for r in layers),
        "plain_share_timed": sum(r["fill_seconds"] + r["solve_seconds"] for r in layers if r["timed"]) / plain,
    }
    bars = [
        Bar("R-GAP on CNN6, times faster than the plain method", plain / summary["rgap_seconds"], 1000.0, "at least"),
        Bar("R-GAP on CNN6, peak memory (MiB)", peak, 500.0, "at most"),
        Bar("R-GAP on CNN6, PSNR (dB)", min(quality, 400.0), 120.0, "at least"),
        Bar("R-GAP over DLG at equal quality, times faster", matching[0]["ratio"], 10.0, "at least"),
    ]
    figures = {"summary": [summary], "plain_layers": layers, "against_dlg": matching}
    finish(options, figures=figures, bars=bars, tables=[rows_table(n, r) for n, r in figures.items()])


def problem(options: argparse.Namespace) -> tuple[Observation, Tensor]:
    """CNN6's gradient of one picture in float64."""
    pictures = real_pictures(options, "cifar10_2000") or photos(32)
    torch.manual_seed(options.seed)
    model = cnn6().double().to(options.device)
    x, y = pictures.images[:1].double().to(options.device), torch.ones(1, 1, dtype=torch.float64).to(options.device)
    function = LossGradient(model, LOSS)
    return Observation(loss_gradient=function, sent=function(x, y), input_shape=(3, 32, 32)), x


# ---------------------------------------------------------------------- the plain method


def plain_layers(observation: Observation, budget: float) -> list[dict[str, Any]]:
    """Seconds of each layer's matrix and its solve, timed or extrapolated."""
    function = observation.loss_gradient
    chain, parameters = walk(function, observation.input_shape), function.parameters()
    layers = [layer for layer in chain.layers if layer.kind == "Conv2d"]
    rng = np.random.default_rng(0)
    rows = []
    for layer in sorted(layers, key=lambda c: math.prod(plain_shape(c)) * plain_shape(c)[1]):
        shape, entries = plain_shape(layer), 2 * layer.outputs * layer.taps
        row: dict[str, Any] = {
            "layer": layer.name,
            "rows": shape[0],
            "columns": shape[1],
            "entries": entries,
            "matrix_MiB": 4 * shape[0] * shape[1] / 2**20,
        }
        last = next((r for r in reversed(rows) if r["timed"]), None)
        if last is not None:
            fill = last["fill_seconds"] * entries / last["entries"]
            solve = last["solve_seconds"] * shape[0] * shape[1] ** 2 / (last["rows"] * last["columns"] ** 2)
            row |= {"fill_seconds": fill, "solve_seconds": solve, "timed": False}
        spent = sum(r["fill_seconds"] + r["solve_seconds"] for r in rows if r["timed"])
        if last is None or spent + row["fill_seconds"] + row["solve_seconds"] < budget:
            k = rng.standard_normal(layer.outputs).astype(np.float32)
            start = time.perf_counter()
            matrix = plain_matrix(layer, parameters[layer.weight].float().cpu().numpy(), k)
            row["fill_seconds"] = time.perf_counter() - start
            start = time.perf_counter()
            np.linalg.lstsq(matrix, np.ones(shape[0], dtype=np.float32), rcond=None)
            row |= {"solve_seconds": time.perf_counter() - start, "timed": True}
            del matrix
        rows.append(row)
    return rows


def padded(layer: Affine) -> tuple[int, int, int]:
    """The layer's input with its padding."""
    channels, height, width = layer.input_shape
    return channels, height + 2 * layer.padding[0], width + 2 * layer.padding[1]


def plain_shape(layer: Affine) -> tuple[int, int]:
    """Rows and columns of a layer's matrix: padding is unknowns, and as many equations that say it is zero."""
    unknowns = math.prod(padded(layer))
    return layer.num_weights + layer.outputs + unknowns - layer.unknowns, unknowns


def plain_matrix(layer: Affine, weight: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Gradient constraints above weight constraints above those of the padding, entry by entry from index lists."""
    channels, height, width = padded(layer)
    filters, out_height, out_width = layer.output_shape
    (k_h, k_w), (s_h, s_w), (p_h, p_w) = layer.kernel, layer.stride, layer.padding
    indices = []
    for f in range(filters):
        for tap in range(channels * k_h * k_w):
            c, m, n = tap // (k_h * k_w), tap // k_w % k_h, tap % k_w
            places = []
            for i in range(out_height):
                for j in range(out_width):
                    output = (f * out_height + i) * out_width + j
                    places.append((output, (c * height + i * s_h + m) * width + j * s_w + n))
            indices.append(places)
    gradient = np.zeros((layer.num_weights, channels * height * width), dtype=np.float32)
    for tap, places in enumerate(indices):
        for output, unknown in places:
            gradient[tap, unknown] = k[output]
    outputs = np.zeros((layer.outputs, channels * height * width), dtype=np.float32)
    for value, places in zip(weight.flatten(), indices, strict=True):
        for output, unknown in places:
            outputs[output, unknown] = value
    padding = []
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                if y < p_h or y >= height - p_h or x < p_w or x >= width - p_w:
                    row = np.zeros(channels * height * width, dtype=np.float32)
                    row[(c * height + y) * width + x] = 1
                    padding.append(row)
    return np.concatenate([gradient, outputs, *([np.array(padding)] if padding else [])])


def plain_scalar(observation: Observation, iterations: int = 30_000) -> float:
    """Seconds of Adam on `(-mu / (1 + e^mu) - u)^2`."""
    name = list(observation.sent)[-1]
    u = float((observation.sent[name] * observation.loss_gradient.parameters()[name]).sum())
    start = time.perf_counter()
    mu = torch.tensor(0.0, requires_grad=True)
    optimiser = torch.optim.Adam([mu], lr=0.01)
    for _ in range(iterations):
        optimiser.zero_grad()
        loss = (-mu / (1 + torch.exp(mu)) - u) ** 2
        loss.backward()
        optimiser.step()
    return time.perf_counter() - start


def _peak_memory(options: argparse.Namespace) -> float:
    """MiB at the peak of an attack above what was in use before."""
    observation, _ = problem(options)
    return peak_memory(lambda: RGAP()(observation), device=options.device)


# ---------------------------------------------------------------------- against DLG


def against_dlg(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The LeNet with tanh and a biased head, which both attacks recover: PSNR and seconds."""
    pictures = real_pictures(options, "mnist_2000")
    images = pictures.images[:1] if pictures else photos(28).images[:1].mean(1, keepdim=True)
    torch.manual_seed(options.seed)
    model = lenet(activation="tanh").double().to(options.device)
    x, y = images.double().to(options.device), torch.tensor([3], device=options.device)
    function = LossGradient(model, nn.CrossEntropyLoss())
    observation = Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 28, 28), labels=y)
    rows = []
    for attack in (RGAP(), DLG(restarts=1)):
        found, elapsed = seconds(lambda a=attack: a(observation, generator=generator(options)), device=options.device)
        psnr = min(fidelity(found.inputs, x).psnr.item(), 400.0)
        rows.append({"attack": attack.name, "psnr": psnr, "seconds": elapsed})
    # Beyond 120 dB both are exact.
    equal = min(rows[0]["psnr"], 120) >= min(rows[1]["psnr"], 120) - 1 and rows[1]["psnr"] >= 40
    rows[0]["ratio"] = rows[1]["seconds"] / rows[0]["seconds"] if equal else None
    return rows


if __name__ == "__main__":
    main()
