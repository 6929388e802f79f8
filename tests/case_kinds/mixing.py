"""Models that mix examples, models that are random, and models that change when they are called."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from case_kinds.case import Case, case, labels, pictures


def vectors(make_model, batch=3):
    return lambda: (make_model(), nn.CrossEntropyLoss(), torch.rand(batch, 4), labels(batch))


class Rule(nn.Module):
    """An inner layer, a rule of `forward`, a head; `rule(self, hidden)`."""

    def __init__(self, rule, **attributes) -> None:
        super().__init__()
        self.inner, self.head, self.rule = nn.Linear(4, 4), nn.Linear(4, 3), rule
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.head(self.rule(self, torch.tanh(self.inner(x))))


def ruled(rule, batch=3, **attributes):
    """`attributes`: functions of nothing."""
    return vectors(lambda: Rule(rule, **{n: a() for n, a in attributes.items()}), batch)


class FlatHead(nn.Module):
    """The whole batch as one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(12, 9)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).reshape(1, -1)).reshape(3, 3)


class BatchAttention(nn.Module):
    """Attention over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x[None], x[None], x[None], need_weights=False)[0][0])


def batch_norm(mode, kind=nn.BatchNorm1d, **options):
    def model():
        return nn.Sequential(nn.Linear(4, 4), kind(4, **options), nn.Tanh(), nn.Linear(4, 3)).train(mode == "train")

    return vectors(model)


def picture_norm(kind, **options):
    def make():
        layers = nn.Conv2d(1, 2, 3, padding=1), kind(2, **options), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
        return nn.Sequential(*layers), nn.CrossEntropyLoss(), pictures(), labels()

    return make


def in_train(middle):
    return vectors(lambda: nn.Sequential(nn.Linear(4, 4), middle(), nn.Linear(4, 3)))


# ---------------------------------------------------------------------- rules that change something


def doubled_in_place(model, hidden):
    return (hidden * 1.5).mul_(2)


class InPlaceOnTheBatch(nn.Module):
    """`forward` writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x.mul_(2).sub_(0.5)
        return self.head(torch.tanh(self.inner(x)))


class OutOfPlace(InPlaceOnTheBatch):
    """What it computes."""

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x * 2 - 0.5)))


class InPlaceThroughAView(InPlaceOnTheBatch):
    """The same through a view of a part."""

    def forward(self, x):
        x[:, 1:3] *= 3
        return self.head(torch.tanh(self.inner(x)))


class OutOfPlaceThroughAView(InPlaceOnTheBatch):
    """What it computes."""

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x * torch.tensor([1, 3, 3, 1]))))


def counted(model, hidden):
    model.steps += 1
    return hidden / model.steps


def counted_in_python(model, hidden):
    model.calls += 1
    return hidden / model.calls


def moving_average(model, hidden):
    with torch.no_grad():
        model.average.mul_(0.9).add_(0.1)
    return hidden * model.average


def replaced_buffer(model, hidden):
    model.average = model.average * 0.5 + 0.25
    return hidden * model.average


def average_of_the_batch(model, hidden):
    with torch.no_grad():
        model.average.mul_(0.9).add_(0.1 * hidden.mean())
    return hidden * (1 + model.average)


def remembered_features(model, hidden):
    model.features = hidden
    return hidden


def cached_table(model, hidden):
    if model.table is None:
        model.table = torch.arange(hidden.shape[1]) / 4
    return hidden + model.table


def appended(model, hidden):
    model.log.append(len(hidden))
    return hidden


# ---------------------------------------------------------------------- rules that draw


def noisy(model, hidden):
    return hidden + 0.1 * torch.randn_like(hidden)


def own_generator(model, hidden):
    return hidden + 0.1 * torch.randn(hidden.shape, generator=model.generator)


def coin(model, hidden):
    return hidden if random.random() < 0.5 else 2 * hidden


def numpy_noise(model, hidden):
    return hidden * float(np.random.rand())  # noqa: NPY002 - the global state is what the case is about


def dropped(model, hidden):
    return F.dropout(hidden, 0.5, training=model.training)


def drop_path(model, hidden):
    keep = torch.rand(len(hidden), 1) < 0.5
    return hidden + hidden.square() * keep


RANDOM = "(?i)random"

CASES: list[Case] = [
    case("BatchNorm1d in train", batch_norm("train"), "mixing", refused="(?i)batchnorm"),
    case(
        "BatchNorm2d in train",
        picture_norm(nn.BatchNorm2d),
        "mixing",
        refused="(?i)batchnorm",
    ),
    case(
        "BatchNorm without running statistics, in eval",
        batch_norm("eval", track_running_stats=False),
        "mixing",
        may_refuse="(?i)batchnorm",
    ),
    case("BatchNorm in train, measured in eval", batch_norm("train"), "mixing", options={"train_mode": "eval"}),
    case("BatchNorm in train, as sent", batch_norm("train"), "mixing", options={"train_mode": "as sent"}),
    case(
        "BatchNorm2d in train, as sent",
        picture_norm(nn.BatchNorm2d),
        "mixing",
        options={"train_mode": "as sent"},
    ),
    case("batch mean subtracted", ruled(lambda m, h: h - h.mean(0)), "mixing"),
    case("batch standardised by hand", ruled(lambda m, h: (h - h.mean(0)) / (h.std(0) + 0.1)), "mixing"),
    case("softmax over the batch", ruled(lambda m, h: h * h.softmax(0)), "mixing"),
    case("neighbour in the batch", ruled(lambda m, h: h + 0.5 * h.roll(1, 0)), "mixing"),
    case("cumulative sum over the batch", ruled(lambda m, h: h.cumsum(0)), "mixing"),
    case(
        "graph of a fixed adjacency",
        ruled(lambda m, h: m.adjacency @ h, adjacency=lambda: torch.eye(3).roll(1, 0) + torch.eye(3)),
        "mixing",
    ),
    case("flat head over the batch", vectors(FlatHead), "mixing"),
    case("attention over the batch", vectors(BatchAttention), "mixing"),
    case("batch of one through a batch mean", ruled(lambda m, h: h + h.mean(0), batch=1), "mixing"),
    case(
        "mixing behind a gate that is zero",
        ruled(lambda m, h: h + m.gamma * h.mean(0), gamma=lambda: nn.Parameter(torch.zeros(()))),
        "mixing",
    ),
    case(
        "a branch behind a gate that is zero",
        ruled(lambda m, h: h + m.gamma * h.square(), gamma=lambda: nn.Parameter(torch.zeros(4))),
        "degenerate",
    ),
    case("Dropout in train", in_train(nn.Dropout), "random", refused="(?i)dropout"),
    case("Dropout in train, measured in eval", in_train(nn.Dropout), "random", options={"train_mode": "eval"}),
    case(
        "Dropout in eval",
        vectors(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3)).eval()),
        "random",
    ),
    case("Dropout in train, as sent", in_train(nn.Dropout), "random", options={"train_mode": "as sent"}),
    case("functional dropout in train, as sent", ruled(dropped), "random", options={"train_mode": "as sent"}),
    case("Dropout of zero in train", in_train(lambda: nn.Dropout(0.0)), "random"),
    case("RReLU in train", in_train(nn.RReLU), "random", refused="(?i)rrelu"),
    case("functional dropout in train", ruled(dropped), "random", refused=RANDOM),
    case(
        "functional dropout in eval",
        vectors(lambda: Rule(dropped).eval()),
        "random",
    ),
    case("drop path by hand", ruled(drop_path), "random", refused=RANDOM),
    case("noise in eval", vectors(lambda: Rule(noisy).eval()), "random", refused=RANDOM),
    case("noise of its own generator", ruled(own_generator, generator=torch.Generator), "random", refused=RANDOM),
    case("a coin of Python's", ruled(coin), "random", refused=RANDOM),
    case("numpy's noise", ruled(numpy_noise), "random", refused=RANDOM),
    case("in place within", ruled(doubled_in_place), "in place"),
    case(
        "ReLU in place",
        vectors(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))),
        "in place",
    ),
    case("ReLU in place first", vectors(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))), "in place"),
    case("in place on the batch", vectors(InPlaceOnTheBatch), "in place", plain=vectors(OutOfPlace)),
    case("in place through a view", vectors(InPlaceThroughAView), "in place", plain=vectors(OutOfPlaceThroughAView)),
    case(
        "InstanceNorm with statistics in train",
        picture_norm(nn.InstanceNorm2d, track_running_stats=True, affine=True),
        "state",
    ),
    case("a counter in a buffer", ruled(counted, steps=lambda: torch.tensor(1)), "state"),
    case("a counter in Python", ruled(counted_in_python, calls=lambda: 1), "state", may_refuse="(?i)chang|state|calls"),
    case("a moving average", ruled(moving_average, average=lambda: torch.tensor(0.5)), "state"),
    case("a buffer that is replaced", ruled(replaced_buffer, average=lambda: torch.tensor(0.5)), "state"),
    case(
        "a moving average of the batch",
        ruled(average_of_the_batch, average=lambda: torch.tensor(0.5)),
        "state",
        "mixing",
    ),
    case("features kept on the model", ruled(remembered_features, features=lambda: None), "state"),
    case("a table made at the first call", ruled(cached_table, table=lambda: None), "state"),
    case("a log in a list", ruled(appended, log=list), "state"),
]
