"""Nothing of the user's changes: a model's state, its attributes, and the global random numbers, put back after use.

A model may do more than compute: count its calls, update statistics, keep what it saw, draw random numbers. While
gradguard evaluates it, all that happens to copies or is undone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint


@dataclass(frozen=True)
class RandomState:
    """The state of the global random number generators.

    Args:
        cpu: Torch's, of the CPU.
        cuda: Torch's, of every CUDA device; empty where CUDA is not in use.
        numpy: NumPy's.
        python: Python's.
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        cuda = (
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
        )
        return cls(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())  # noqa: NPY002  # theirs

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            torch.equal(self.cpu, other.cpu)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, other.cuda, strict=False))
            and self.numpy[2] == other.numpy[2]
            and bool((self.numpy[1] == other.numpy[1]).all())
            and self.python == other.python
        )


@contextmanager
def random_state_kept() -> Iterator[RandomState]:
    """The global generators are where they were after the block; gives their state before it."""
    before = RandomState.now()
    try:
        yield before
    finally:
        before.restore()


class ModuleState:
    """Attributes of a model's modules: what they were, to see what changed and to put it back.

    Parameters and buffers are not copied: gradguard hands the model copies of them. Plain tensors and generators among
    the attributes are.

    Args:
        model: Its modules' attributes are taken when this object is made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, _copy_of(vars(module))) for module in model.modules()]
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        for module, _ in self._modules:
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_inference():
                    self._tensors.append((value, value.detach().clone(), value._version))
                elif isinstance(value, torch.Generator):
                    self._generators.append((value, value.get_state()))

    def random_moved(self) -> bool:
        """Whether a generator of the model's own has been drawn from."""
        return any(not torch.equal(generator.get_state(), state) for generator, state in self._generators)

    def restore(self) -> None:
        """Put everything back."""
        for module, (attributes, containers) in self._modules:
            now = vars(module)
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                now.clear()
                now.update(attributes)
            for container, content in containers:
                _refill(container, content)
        with torch.no_grad():
            for tensor, value, version in self._tensors:
                if tensor._version != version:  # raised by anything done in place
                    tensor.copy_(value)
        for generator, state in self._generators:
            generator.set_state(state)


def _copy_of(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Attributes as they are, and the content of those that are containers."""
    containers = [(v, v.copy()) for v in attributes.values() if isinstance(v, dict | list | set)]
    return dict(attributes), containers


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
        return
    if isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
        return
    same = container.keys() == content.keys() and all(container[k] is v for k, v in content.items())
    if not same:
        container.clear()
        container.update(content)


@contextmanager
def preserved(model: nn.Module) -> Iterator[ModuleState]:
    """The model's attributes are what they were after the block."""
    state = ModuleState(model)
    try:
        yield state
    finally:
        state.restore()


def loss_module(loss_fn: Any) -> nn.Module | None:
    """The module whose tensors a loss computes with: itself, or the one that it is a method of."""
    owner = getattr(loss_fn, "__self__", loss_fn)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def cast_state(module: nn.Module | None, dtype: torch.dtype | None) -> Iterator[None]:
    """A module's parameters and buffers (class weights) in `dtype` for a while; its own come back."""
    if module is None or dtype is None:
        yield
        return
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for part in module.modules():
            for slots in (part._parameters, part._buffers):
                other = {n: v for n, v in slots.items() if v is not None and v.is_floating_point() and v.dtype != dtype}
                if other:
                    kept.append((slots, dict(slots)))
                    slots |= {n: v.detach().to(dtype) for n, v in other.items()}
        yield
    finally:
        for slots, before in kept:
            slots.clear()
            slots.update(before)


class _Direct:
    """In the place of re-entrant checkpointing's function: computes, and keeps what backward needs."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *arguments: Any) -> Any:
        """The function itself."""
        return function(*arguments)


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Activation checkpointing off: it computes again at backward, when the model holds its own parameters again."""
    kept = {name: getattr(checkpoint, name) for name in ("_checkpoint_hook", "CheckpointFunction")}
    checkpoint._checkpoint_hook = lambda frame: nullcontext()  # type: ignore[assignment,misc,return-value]
    checkpoint.CheckpointFunction = _Direct  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)
