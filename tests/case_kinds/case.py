"""A case: a model, a loss and a batch that somebody could have, and what gradguard owes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Made(NamedTuple):
    """What a case is about: `loss_fn(model(inputs), targets)`, as the user has them."""

    model: Any
    loss_fn: Any
    inputs: Any
    targets: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One (model, loss, batch).

    `make`: builds it anew, the same each time: it runs under its own seed. `options`: for `LossGradient` and `Guard`.
    `refused`: what the message of the refusal must match (a regular expression); `None`: the answer must be right.
    `may_refuse`: the same for cases that are either right or refused by name, nothing else.
    `plain`: the same function without a wrapper, for the reference; its parameters are in the same order.
    `tolerance`: relative, in float64; where it is not 1e-6, the case says why.
    `own_dtype`: the case is about the dtype of its model: it is measured in it, and compared at `dtype_tolerance`.
    `around`: what gradguard is called within.
    `tags`: what kind of case it is; "slow" ones are left out of the quick tests.
    """

    name: str
    make: Callable[[], tuple]
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    may_refuse: str | None = None
    plain: Callable[[], tuple] | None = None
    tolerance: float = 1e-6
    own_dtype: bool = False
    dtype_tolerance: float = 1e-6
    around: Callable[[], AbstractContextManager] = nullcontext
    tags: frozenset[str] = frozenset()

    def build(self) -> Made:
        """The case as the user has it; nothing of the caller's random state moves."""
        return _seeded(self.make)

    def build_plain(self) -> Made:
        """What the reference differentiates, not yet in float64."""
        return _seeded(self.plain or self.make)


def _seeded(make: Callable[[], tuple]) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Made(*make())


def case(name: str, make: Callable[[], tuple], *tags: str, **others: Any) -> Case:
    """`Case`, with its tags behind."""
    return Case(name=name, make=make, tags=frozenset(tags), **others)


def pictures(batch: int = 3, channels: int = 1, size: int = 4) -> Tensor:
    """Random pictures in [0, 1]: `(batch, channels, size, size)`."""
    return torch.rand(batch, channels, size, size)


def labels(batch: int = 3, classes: int = 3) -> Tensor:
    """0, 1, 2, ... : `(batch,)`."""
    return torch.arange(batch) % classes


def to_double(value: Any) -> Any:
    """Floating-point tensors of any structure in float64, the rest as it is."""
    if isinstance(value, Tensor):
        return value.double().clone() if value.is_floating_point() else value.clone()
    if isinstance(value, Mapping):
        return {k: to_double(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_double(v) for v in value)
    return value


def first_private(inputs: Any, private: str | int | None) -> Any:
    """The key of the private leaf: `None` for a lone tensor, else the one given or the first floating-point leaf."""
    if isinstance(inputs, Tensor):
        return None
    if private is not None:
        return private
    pairs = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return next(key for key, leaf in pairs if leaf.is_floating_point())


def leaf_of(inputs: Any, key: Any) -> Tensor:
    """The private leaf."""
    return inputs if key is None else inputs[key]


def with_leaf(inputs: Any, key: Any, leaf: Tensor) -> Any:
    """`inputs` with another private leaf."""
    if key is None:
        return leaf
    if isinstance(inputs, Mapping):
        return {**inputs, key: leaf}
    return tuple(leaf if i == key else v for i, v in enumerate(inputs))
