"""Data of any kind as batches of examples: data sets, loaders, pairs of tensors, `Pictures`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gradguard.errors import InputError
from gradguard.zoo.pictures import Pictures

Batch = tuple[Tensor, Tensor]


def chunks(data: Any, size: int, examples: int | None) -> Iterator[Batch]:
    """`data` as batches of `size`, the last one shorter; at most `examples` examples."""
    held: list[Batch] = []
    left = examples
    for batch in _segments(data, size):
        inputs, targets = batch if left is None else (part[:left] for part in batch)
        left = None if left is None else left - len(inputs)
        held.append((inputs, targets))
        while sum(len(x) for x, _ in held) >= size:
            inputs, targets = _joined(held)
            yield inputs[:size], targets[:size]
            held = [(inputs[size:], targets[size:])]
        if left == 0:
            break
    if sum(len(x) for x, _ in held):
        yield _joined(held)


def _segments(data: Any, size: int) -> Iterator[Batch]:
    """Batches of whatever length the data come in."""
    pair = in_memory(data)
    if pair is not None:
        inputs, targets = _checked(*pair)
        yield from ((inputs[r : r + size], targets[r : r + size]) for r in range(0, len(inputs), size))
    elif isinstance(data, IterableDataset) or _is_map_style(data):
        examples = (data[i] for i in range(len(data))) if _is_map_style(data) else iter(data)
        # One at a time, so that an error or Ctrl-C in the data set loses nothing that was read before.
        for item in examples:
            x, y = _pair(item)
            yield _checked(torch.as_tensor(x)[None], torch.as_tensor(y)[None])
    elif isinstance(data, Iterable) and not isinstance(data, Tensor | str | bytes):
        for item in data:
            x, y = _pair(item)
            yield _checked(torch.as_tensor(x), torch.as_tensor(y))
    else:
        raise InputError(
            "`data` must be a Dataset, an iterable of (inputs, targets) such as a DataLoader, a pair of tensors or "
            f"gradguard.zoo.pictures.Pictures, got {type(data).__name__}."
        )


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"`data` must give pairs (inputs, targets), and gave a {type(item).__name__}.")
    x, y = item
    if not isinstance(x, Tensor | np.ndarray):
        raise InputError(
            f"`data` must give inputs as tensors, and gave a {type(x).__name__}. Give the data set a "
            "transform to tensors."
        )
    return x, y


def _checked(inputs: Tensor, targets: Tensor) -> Batch:
    if targets.ndim == 0 or inputs.ndim == 0 or len(inputs) != len(targets):
        raise InputError(
            f"`data` must hold one target per example, got inputs {tuple(inputs.shape)} and targets "
            f"{tuple(targets.shape)}."
        )
    return inputs, targets


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    try:
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    except RuntimeError as error:
        raise InputError(f"The examples of `data` must have one shape to be measured together: {error}.") from error


def in_memory(data: Any) -> Batch | None:
    """Inputs and targets of data that are tensors already."""
    if isinstance(data, Pictures):
        return data.images, data.labels
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return data[0], data[1]
    return None


def _is_map_style(data: Any) -> bool:
    plain = isinstance(data, Tensor | list | tuple | str | bytes | IterableDataset)
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def length(data: Any) -> int | None:
    """How many examples there are, where that is known beforehand."""
    pair = in_memory(data)
    if pair is not None:
        return len(pair[0])
    inner = data if _is_map_style(data) else getattr(data, "dataset", None)
    return len(inner) if inner is not None and hasattr(inner, "__len__") else None


def class_names(data: Any) -> tuple[str, ...]:
    """The data set's own names: `class_names`, or `classes` as torchvision calls them."""
    for owner in (data, getattr(data, "dataset", None)):
        for name in ("class_names", "classes"):
            found = getattr(owner, name, None)
            if found:
                return tuple(str(n) for n in found)
    return ()
