"""Minimising `T` functions at once: a search that can be watched, shrunk to the trials still going, and resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import InputError

#: `(T, n) -> values (T,), gradients (T, n)`.
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Puts points `(T, n)` back where they are allowed to be.
Projection = Callable[[Tensor], Tensor]


class Search(ABC):
    """`T` minimisations in progress. Every tensor it holds has the trials as its first axis.

    `point`, `value`: `(T, n)` and `(T,)`, the best of each trial so far, `inf` before the first evaluation;
    `ended`: `(T,)`, trials that will not move any more; `broken`: `(T,)`, those that met nothing finite to go on from.
    """

    point: Tensor
    value: Tensor
    ended: Tensor
    broken: Tensor

    @abstractmethod
    def advance(self, function: ValueAndGradient) -> None:
        """One evaluation of all trials, and what follows from it. Reads nothing back from the device."""

    @abstractmethod
    def begin(self, which: Tensor, start: Tensor) -> None:
        """Start the trials of the mask `which` `(T,)` anew, from their rows of `start` `(T, n)`."""

    def tensors(self) -> dict[str, Tensor]:
        """Its whole state."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the state that `tensors()` gave. Raises `InputError` if it is another search's."""
        own = self.tensors()
        if set(tensors) != set(own) or any(tensors[n].shape[1:] != own[n].shape[1:] for n in own):
            raise InputError(
                "This state belongs to another search (another optimiser, memory, or other inputs). Go on with the "
                "attack that wrote it, or delete the file to start anew."
            )
        for name, value in tensors.items():
            setattr(self, name, value.to(own[name]))

    def extend(self, other: Search) -> None:
        """Take the trials of `other`, a search of the same kind, behind the own ones."""
        theirs = other.tensors()
        for name, value in self.tensors().items():
            setattr(self, name, torch.cat([value, theirs[name]]))

    def select(self, rows: Tensor) -> None:
        """Keep the trials `rows` (indices) only."""
        for name, value in self.tensors().items():
            setattr(self, name, value[rows])


@dataclass(frozen=True, kw_only=True)
class Optimiser(ABC):
    """How to minimise: options here, the state in the `Search` that `search` gives."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How often it evaluates each trial at most."""

    @abstractmethod
    def search(self, start: Tensor, *, target: float = 0.0, project: Projection | None = None) -> Search:
        """Begin at `start` `(T, n)`. `target`: a trial with a value at most this has ended. `project`: see there."""


def rows_where(which: Tensor, these: Tensor, those: Tensor) -> Tensor:
    """Row by row `these` where the mask `which` `(T,)` holds, else `those`: shapes `(T, ...)`."""
    return torch.where(which.reshape(-1, *[1] * (these.ndim - 1)), these, those)
