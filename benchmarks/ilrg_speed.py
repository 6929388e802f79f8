"""How long one label restoration takes: ours against the published method element by element, as the authors' code is.

1,000 classes, 2,048 features, 4,096 examples: features as an untrained ReLU network gives them (a pattern that all
share, and a little of their own). The plain form divides class by class and element by element, rounding each element
through its decimal exponent as the authors do, builds the system entry by entry, and inverts it by a pseudo-inverse.
It is timed in full for the system and on a share of the classes for the embeddings (every class costs the same), and
extrapolated by that share: the figures say both.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from common import Bar, benchmark_parser, finish, generator, rows_table, seconds
from gradguard.attacks._labels.counts import restore_label_counts
from gradguard.leakage.labels import count_labels, label_recovery

CLASSES, FEATURES, BATCH = 1000, 2048, 4096


def problem(options: argparse.Namespace) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Weight and bias gradients, weight and bias; the labels."""
    draw = generator(options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = nn.Linear(FEATURES, CLASSES)
    weight, bias = head.weight.detach(), head.bias.detach()
    own = 0.06 * torch.randn(BATCH, FEATURES, generator=draw)
    features = (torch.rand(FEATURES, generator=draw) + own).relu()
    labels = torch.randint(CLASSES, (BATCH,), generator=draw)
    slopes = ((features @ weight.T + bias).softmax(1) - one_hot(labels, CLASSES)) / BATCH
    sent = tuple(t.to(options.device) for t in (slopes.T @ features, slopes.sum(0), weight, bias))
    return sent, labels  # type: ignore[return-value]


def plain_embedding(row: Tensor, slope: Tensor) -> Tensor:
    """`grad W_c / grad b_c`, one tensor element at a time: mantissa and decimal exponent by themselves."""
    result = torch.zeros(len(row), dtype=torch.float64)
    for index in range(len(row)):
        value, divisor = row[index].item(), slope.item()
        if value == 0 or divisor == 0:
            continue
        exponent = math.floor(math.log10(abs(value))) - math.floor(math.log10(abs(divisor)))
        result[index] = round(value / divisor / 10.0**exponent, 7) * 10.0 ** min(exponent, 10)
    return result


def plain_times(sent: tuple[Tensor, ...], share: int) -> tuple[float, float]:
    """Seconds of the plain form: embeddings of all classes (timed on one in `share`), and the rest."""
    w_grad, b_grad, weight, bias = (t.cpu().double() for t in sent)
    start = time.perf_counter()
    some = [plain_embedding(w_grad[c], b_grad[c]) for c in range(0, CLASSES, share)]
    embedding = (time.perf_counter() - start) * CLASSES / len(some)
    start = time.perf_counter()
    probabilities = torch.stack([(weight @ (w_grad[c] / b_grad[c]) + bias).softmax(0) for c in range(CLASSES)])
    coefficients = np.ones((CLASSES + 1, CLASSES))
    values = np.full(CLASSES + 1, float(BATCH))
    for i in range(CLASSES):
        for j in range(CLASSES):
            coefficients[i + 1, j] = probabilities[j][i].item() - (1.0 if i == j else 0.0)
        values[i + 1] = BATCH * b_grad[i].item()
    np.linalg.pinv(coefficients) @ values
    return embedding, time.perf_counter() - start


def main() -> None:
    """Time both."""
    options = benchmark_parser(__doc__).parse_args()
    sent, labels = problem(options)
    true = count_labels(labels, CLASSES)
    rows = []
    share = 50 if options.quick else 10
    embedding, rest = plain_times(sent, share)
    for name, refinements in (("published method", 0), ("ILRG()", 2)):

        def ours(refinements: int = refinements) -> Tensor:
            return restore_label_counts(*sent, BATCH, refinements=refinements).counts

        ours()
        times = sorted(seconds(ours, device=options.device)[1] for _ in range(7))
        rows.append(
            {
                "method": name,
                "classes": CLASSES,
                "features": FEATURES,
                "batch": BATCH,
                "seconds, median": times[3],
                "seconds, least": times[0],
                "plain form, seconds": embedding + rest,
                "of which embeddings (extrapolated)": embedding,
                "classes timed": CLASSES // share,
                "times faster": (embedding + rest) / times[3],
                "LnAcc": label_recovery(ours().cpu(), true).ln_acc,
            }
        )
    bars = [
        Bar("published method: times faster than its plain form", rows[0]["times faster"], 100.0, "at least"),
        Bar("ILRG(): seconds, median", rows[1]["seconds, median"], 1.0, "at most"),
    ]
    finish(options, figures={"speed": rows}, bars=bars, tables=[rows_table("One restoration", rows)])


if __name__ == "__main__":
    main()
