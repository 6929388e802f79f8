"""Structures of inputs, targets and outputs; dtypes; and where gradguard is called from."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_kinds.case import Case, case, labels, pictures

Heads = namedtuple("Heads", ["scores", "values"])


@dataclass
class HeadsData:
    """Outputs as a plain dataclass."""

    scores: Tensor
    values: Tensor


class Core(nn.Module):
    """An inner layer and a head; what differs is how it is called and how it answers."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inner, self.head, self.second = nn.Linear(size, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def hidden(self, x):
        return torch.tanh(self.inner(x))


class Answers(Core):
    """Several heads, in some structure."""

    def __init__(self, build) -> None:
        super().__init__()
        self.build = build

    def forward(self, x):
        hidden = self.hidden(x)
        return self.build(self.head(hidden), self.second(hidden))


class MaskedMean(Core):
    """Vectors of tokens and a mask."""

    def forward(self, x, mask):
        hidden = self.hidden(x) * mask[..., None]
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))


class ByName(Core):
    """Called by name: vectors beside ages."""

    def forward(self, *, picture, age, flag=None):
        hidden = self.hidden(picture.flatten(1)) * age[:, None]
        if flag is not None:
            hidden = torch.where(flag[:, None], hidden, -hidden)
        return self.head(hidden)


class TwoOfAKind(Core):
    """Two floating-point inputs."""

    def forward(self, a, b):
        return self.head(self.hidden(a) * b)


class Mixture(nn.Module):
    """A model that is told the labels, and answers with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, labels=None):
        scores = self.head(torch.tanh(self.inner(x)))
        return {"loss": F.cross_entropy(scores, labels), "scores": scores}


class TokenModel(nn.Module):
    """Tokens, a table, positions, a mask of padding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens, mask=None):
        x = self.table(tokens) + self.positions(torch.arange(tokens.shape[1]))
        hidden = torch.tanh(self.inner(x))
        if mask is not None:
            mixed = (hidden * mask[..., None]).cumsum(1) / mask.cumsum(1)[..., None]
            hidden = hidden + mixed
        return self.head(hidden)


def answered(build, loss_fn):
    return lambda: (Answers(build), loss_fn, torch.rand(3, 4), (labels(), torch.randn(3, 1)))


def two_losses(scores, values, targets):
    return F.cross_entropy(scores, targets[0]) + 0.3 * F.mse_loss(values, targets[1])


def by_key(outputs, targets):
    return two_losses(outputs["scores"], outputs["values"], targets)


def by_attribute(outputs, targets):
    return two_losses(outputs.scores, outputs.values, targets)


def by_place(outputs, targets):
    return two_losses(outputs[0], outputs[1], targets)


def mask():
    return torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]])


def by_name(flag=False):
    def make():
        inputs = {"picture": pictures(size=2), "age": torch.tensor([0.5, 1.0, 2.0])}
        if flag:
            inputs = {"flag": torch.tensor([True, False, True]), **inputs}
        return ByName(), nn.CrossEntropyLoss(), inputs, labels()

    return make


def tokens(tied=False, masked=False):
    def make():
        model = TokenModel(tied)
        ids = torch.tensor([[1, 2, 3, 4, 5], [6, 1, 0, 0, 0], [3, 3, 2, 0, 0]])
        embedded = model.table(ids).detach()
        present = (ids > 0).float()
        inputs = {"tokens": embedded, "mask": present} if masked else embedded
        return model, token_loss, inputs, ids.masked_fill(ids == 0, -100)

    return make


def token_loss(scores, targets):
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def typed(dtype, loss_fn=nn.CrossEntropyLoss, values=(0, 1, 2)):
    """Targets of another dtype; `int64` for the reference."""

    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        return model, loss_fn(), torch.rand(3, 4), torch.tensor(values, dtype=dtype)

    return make


def binary_targets(dtype):
    def make():
        targets = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=dtype)
        return nn.Linear(4, 3), lambda o, t: F.binary_cross_entropy_with_logits(o, t.to(o)), torch.rand(3, 4), targets

    return make


def of_dtype(dtype, inputs_too=True):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        inputs = torch.rand(3, 4)
        return model, nn.CrossEntropyLoss(), inputs.to(dtype) if inputs_too else inputs, labels()

    return make


class CastsToFloat(Core):
    """A model that casts to float32 by itself."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.cast = cast

    def forward(self, x):
        return self.head(self.hidden(x.float() if self.cast else x))


def casts(cast):
    return lambda: (CastsToFloat(cast), nn.CrossEntropyLoss(), torch.rand(3, 4), labels())


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), nn.CrossEntropyLoss(), torch.rand(3, 4), labels()


def convolution():
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3)
    return nn.Sequential(*layers), nn.CrossEntropyLoss(), pictures(), labels()


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.core(x)[0][:, -1])

    return Last(), nn.CrossEntropyLoss(), torch.rand(3, 4, 3), labels()


def inference_batch():
    model, loss_fn, *_ = small()
    with torch.inference_mode():
        return model, loss_fn, torch.rand(3, 4), labels()


def strided():
    model, loss_fn, *_ = convolution()
    return model, loss_fn, torch.rand(3, 4, 4, 1).permute(0, 3, 1, 2), labels()


def expanded():
    model, loss_fn, *_ = small()
    return model, loss_fn, torch.rand(1, 4).expand(3, 4), labels()


def attached():
    model, loss_fn, inputs, targets = small()
    return model, loss_fn, (inputs.requires_grad_(True) * 1.0), targets


def with_gradients():
    """In the middle of a step: `.grad` is there and must stay."""
    model, loss_fn, inputs, targets = small()
    loss_fn(model(inputs), targets).backward()
    return model, loss_fn, inputs, targets


def autocast() -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def around(name: str, context: Callable[[], AbstractContextManager], make=small) -> Case:
    return case(name, make, "context", around=context)


CASES: list[Case] = [
    case("outputs in a tuple", answered(lambda a, b: (a, b), by_place), "structure"),
    case("outputs in a list", answered(lambda a, b: [a, b], by_place), "structure"),
    case("outputs in a dict", answered(lambda a, b: {"scores": a, "values": b}, by_key), "structure"),
    case("outputs in a named tuple", answered(Heads, by_attribute), "structure"),
    case("outputs in a dataclass", answered(HeadsData, by_attribute), "structure"),
    case(
        "targets in a dict",
        lambda: (
            Answers(lambda a, b: (a, b)),
            lambda o, t: two_losses(*o, (t["class"], t["value"])),
            torch.rand(3, 4),
            {"class": labels(), "value": torch.randn(3, 1)},
        ),
        "structure",
    ),
    case(
        "one head of two in the loss",
        answered(lambda a, b: (a, b), lambda o, t: F.cross_entropy(o[0], t[0])),
        "structure",
    ),
    case(
        "two inputs, the first private",
        lambda: (TwoOfAKind(), nn.CrossEntropyLoss(), (torch.rand(3, 4), torch.rand(3, 4)), labels()),
        "structure",
    ),
    case(
        "two inputs, the second private",
        lambda: (TwoOfAKind(), nn.CrossEntropyLoss(), (torch.rand(3, 4), torch.rand(3, 4)), labels()),
        "structure",
        options={"private": 1},
    ),
    case(
        "vectors and a mask in a tuple",
        lambda: (MaskedMean(), nn.CrossEntropyLoss(), (torch.rand(3, 3, 4), mask()), labels()),
        "structure",
    ),
    case("inputs by name", by_name(), "structure"),
    case("inputs by name, a flag first", by_name(flag=True), "structure"),
    case("inputs by name, another private", by_name(), "structure", options={"private": "age"}),
    case(
        "the model is told the labels",
        lambda: (Mixture(), lambda o, t: o["loss"], {"x": torch.rand(3, 4), "labels": labels()}, labels()),
        "structure",
    ),
    case("tokens by input_module", tokens(), "tokens", options={"input_module": "table"}),
    case("tokens, tied head", tokens(tied=True), "tokens", options={"input_module": "table"}),
    case("tokens and a mask in a dict", tokens(masked=True), "tokens", options={"input_module": "table"}),
    *(
        case(f"labels in {str(d)[6:]}", typed(d), "dtype", plain=typed(torch.int64))
        for d in (torch.int32, torch.int16, torch.int8, torch.uint8)
    ),
    case("targets in bool", binary_targets(torch.bool), "dtype"),
    case("targets in int32 for a binary loss", binary_targets(torch.int32), "dtype"),
    case("model in float64", of_dtype(torch.float64), "dtype"),
    case("model in float64, inputs in float32", of_dtype(torch.float64, inputs_too=False), "dtype"),
    case("model in float16", of_dtype(torch.float16), "dtype", own_dtype=True, dtype_tolerance=1e-3),
    case("model in bfloat16", of_dtype(torch.bfloat16), "dtype", own_dtype=True, dtype_tolerance=1e-3),
    case("model casts to float32", casts(True), "dtype", plain=casts(False), may_refuse="(?i)dtype|float|double"),
    case("inputs not contiguous", strided, "layout"),
    case("inputs expanded", expanded, "layout"),
    case("inputs with a history", attached, "layout"),
    case("inputs made in inference mode", inference_batch, "layout"),
    case("a step under way", with_gradients, "layout"),
    around("inside inference_mode", torch.inference_mode),
    around("inside inference_mode, convolution", torch.inference_mode, convolution),
    around("inside inference_mode, recurrent", torch.inference_mode, recurrent),
    around("inside no_grad", torch.no_grad, convolution),
    around("inside no_grad, recurrent", torch.no_grad, recurrent),
    around("inside autocast", autocast, convolution),
    around("with float64 as default", lambda: default_dtype(torch.float64), convolution),
]
