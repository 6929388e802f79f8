"""Nothing of the user's changes: what a model and the process look like before and after."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: What a module keeps beside tensors: hooks by kind, and what was set on it.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


@contextmanager
def unchanged(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Within it a model, tensors and the process's random numbers may be used, and are the same at the end.

    Compares, bit by bit: parameters, buffers and their gradients, `requires_grad`, training flags, hooks and what else
    is set on modules, `tensors`, the global states of torch's, numpy's and Python's random numbers, the default dtype.

    Args:
        model: the user's.
        tensors: other things of the user's.

    Raises:
        AssertionError: naming what has changed.
    """
    before = _state(model, tensors)
    yield
    after = _state(model, tensors)
    assert list(before) == list(after), f"appeared or went: {sorted(set(before) ^ set(after))}"
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    assert not changed, f"changed: {changed}"


def _state(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name} of the model"] = tensor.detach().clone()
        state[f"{name}: which tensor"] = id(tensor)
        state[f"{name}: requires_grad"] = tensor.requires_grad
        state[f"{name}: grad"] = None if tensor.grad is None else tensor.grad.clone()
    for name, module in model.named_modules():
        where = name or type(module).__name__
        state[f"{where}: training"] = module.training
        state[f"{where}: hooks"] = [list(getattr(module, kind, {})) for kind in HOOKS]
        state[f"{where}: attributes"] = sorted(vars(module))
    for position, tensor in enumerate(tensors):
        state[f"tensor {position}"] = tensor.detach().clone()
    state["torch's random numbers"] = torch.get_rng_state()
    state["numpy's random numbers"] = np.array(np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002  # read, not drawn from
    state["Python's random numbers"] = random.getstate()
    state["default dtype"] = torch.get_default_dtype()
    state["gradients on"] = torch.is_grad_enabled()
    return state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)
