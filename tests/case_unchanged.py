"""What a public call must leave as it was: the model, the loss, the batch, and the process's own state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from case_kinds.case import Made

#: How deep containers that hang on a module are looked through.
DEPTH = 4


def snapshot(made: Made) -> dict[str, Any]:
    """Everything that must be the same afterwards, by name."""
    state: dict[str, Any] = {
        "random state of Python": random.getstate(),
        "random state of numpy": _of(np.random.get_state(), DEPTH),  # noqa: NPY002 - what must not move
        "random state of torch": _of(torch.get_rng_state(), DEPTH)[2:],
        "default dtype": torch.get_default_dtype(),
        "gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "inputs": _of(made.inputs, DEPTH),
        "targets": _of(made.targets, DEPTH),
    }
    for name, module in made.model.named_modules():
        state |= {f"model: {name}.{n}": _of(v, DEPTH) for n, v in vars(module).items()}
    owner = getattr(made.loss_fn, "__self__", made.loss_fn)
    for name, module in owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]:
        state |= {f"loss: {name}.{n}": _of(v, DEPTH) for n, v in getattr(module, "__dict__", {}).items()}
    return state


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what differs, what has come and what has gone."""
    return [n for n in {**before, **after} if n not in before or n not in after or before[n] != after[n]]


def _of(value: Any, depth: int) -> Any:
    """`value` as something that compares by what it holds: bytes of tensors, identity of what cannot be looked into."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, torch.Generator):
        return ("generator", id(value), value.get_state().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, nn.Module):
        return ("module", id(value))
    if depth and isinstance(value, Mapping):
        return (
            "mapping",
            type(value),
            [(k if isinstance(k, str) else repr(k), _of(v, depth - 1)) for k, v in value.items()],
        )
    if depth and isinstance(value, list | tuple | set | frozenset):
        return (type(value), [_of(v, depth - 1) for v in value])
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return value
    return ("object", id(value))


def _of_tensor(value: Tensor) -> tuple:
    try:
        plain = value.detach()
    except RuntimeError:  # a tensor of a transform that has ended
        return ("broken tensor", id(value))
    raw = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    grad = None
    if value.is_leaf and not value.is_inference() and value.grad is not None:
        grad = (id(value.grad), value.grad.numpy().tobytes())
    hooks = list(value._backward_hooks) if value._backward_hooks else []
    return ("tensor", id(value), raw, value.dtype, tuple(value.shape), value.requires_grad, grad, hooks)
