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

    Attributes:
        point: Shape `(T, n)`, the best point of each trial so far.
        value: Shape `(T,)`, the value there; `inf` before the first evaluation.
        ended: Shape `(T,)`, trials that will not move any more.
        broken: Shape `(T,)`, trials that met nothing finite to go on from.
    """

    point: Tensor
    value: Tensor
    ended: Tensor
    broken: Tensor

    @abstractmethod
    def advance(self, function: ValueAndGradient) -> None:
        """Evaluate all trials once, and do what follows from it. Reads nothing back from the device.

        Args:
            function: Values `(T,)` and gradients `(T, n)` of points `(T, n)`.
        """

    @abstractmethod
    def begin(self, which: Tensor, start: Tensor) -> None:
        """Start some trials anew.

        Args:
            which: A mask `(T,)` of the trials.
            start: Shape `(T, n)`; the rows of those trials are read.
        """

    def tensors(self) -> dict[str, Tensor]:
        """The whole state of the search.

        Returns:
            Tensors by name; trials are the first axis of each.
        """
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Args:
            tensors: What `tensors()` gave.

        Raises:
            InputError: If it is the state of another search.
        """
        own = self.tensors()
        if set(tensors) != set(own) or any(tensors[n].shape[1:] != own[n].shape[1:] for n in own):
            raise InputError(
                "This state belongs to another search (another optimiser, memory, or other inputs). Go on with the "
                "attack that wrote it, or delete the file to start anew."
            )
        for name, value in tensors.items():
            setattr(self, name, value.to(own[name]))

    def extend(self, other: Search) -> None:
        """Add the trials of another search behind the own ones.

        Args:
            other: A search of the same kind.
        """
        theirs = other.tensors()
        for name, value in self.tensors().items():
            setattr(self, name, torch.cat([value, theirs[name]]))

    def select(self, rows: Tensor) -> None:
        """Keep some trials only.

        Args:
            rows: Their indices.
        """
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
        """Begin a search.

        Args:
            start: Shape `(T, n)`.
            target: A trial with a value at most this has ended.
            project: Puts points `(T, n)` back where they are allowed to be.

        Returns:
            The state, not advanced yet.
        """


def rows_where(which: Tensor, these: Tensor, those: Tensor) -> Tensor:
    """Choose row by row.

    Args:
        which: A mask `(T,)`.
        these: Shape `(T, ...)`, taken where the mask holds.
        those: The same shape, taken elsewhere.

    Returns:
        The same shape.
    """
    return torch.where(which.reshape(-1, *[1] * (these.ndim - 1)), these, those)
