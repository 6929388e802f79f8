"""Data of any kind as batches of examples: data sets, loaders, pairs of tensors or structures, `Pictures`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gradguard.errors import InputError
from gradguard.functional.structures import is_structured, named_leaves, rebuild
from gradguard.functional.whole_batch import concatenated, inputs_and_targets, num_examples, rows_of_tree
from gradguard.zoo.pictures import Pictures

#: Inputs and targets: tensors with the batch first, or structures of them.
Batch = tuple[Any, Any]


def chunks(data: Any, size: int, examples: int | None) -> Iterator[Batch]:
    """`data` as batches of `size`, the last one shorter; at most `examples` examples."""
    held: list[Batch] = []
    left = examples
    for segment in _segments(data, size):
        batch = segment if left is None else _rows(segment, slice(left))
        left = None if left is None else left - num_examples(batch[0])
        held.append(batch)
        while sum(num_examples(x) for x, _ in held) >= size:
            whole = _joined(held)
            yield _rows(whole, slice(size))
            held = [_rows(whole, slice(size, None))]
        if left == 0:
            break
    if sum(num_examples(x) for x, _ in held):
        yield _joined(held)


def _rows(batch: Batch, rows: slice) -> Batch:
    count = num_examples(batch[0])
    return rows_of_tree(batch[0], rows, count), rows_of_tree(batch[1], rows, count)


def _segments(data: Any, size: int) -> Iterator[Batch]:
    """Batches of whatever length the data come in."""
    held = in_memory(data)
    if held is not None:
        whole = _checked(*held)
        yield from (_rows(whole, slice(r, r + size)) for r in range(0, num_examples(whole[0]), size))
    elif isinstance(data, IterableDataset) or _is_map_style(data):
        examples = (data[i] for i in range(len(data))) if _is_map_style(data) else iter(data)
        # One at a time, so that an error or Ctrl-C in the data set loses nothing that was read before.
        for item in examples:
            yield _checked(*(rebuild(part, _one_row) for part in _pair(item)))
    elif isinstance(data, Iterable) and not isinstance(data, Tensor | str | bytes):
        for item in data:
            yield _checked(*(rebuild(part, _tensor) for part in _pair(item)))
    else:
        raise InputError(
            "`data` must be a Dataset, an iterable of (inputs, targets) such as a DataLoader, a pair of tensors or of "
            f"structures, or gradguard.zoo.pictures.Pictures, got {type(data).__name__}."
        )


def _pair(item: Any) -> Batch:
    try:
        x, y = inputs_and_targets(item)
    except InputError as error:
        raise InputError(f"`data` must give pairs (inputs, targets), and gave {error}.") from error
    for leaf in [x] if not is_structured(x) else [leaf for _, leaf in named_leaves(x)]:
        if not isinstance(leaf, Tensor | np.ndarray) and not (
            is_structured(x) and isinstance(leaf, int | float | NoneType)
        ):
            raise InputError(
                f"`data` must give inputs as tensors, and gave a {type(leaf).__name__}. Give the data set a "
                "transform to tensors."
            )
    return x, y


def _tensor(leaf: Any) -> Any:
    return torch.as_tensor(leaf) if isinstance(leaf, Tensor | np.ndarray | np.generic | list) else leaf


def _one_row(leaf: Any) -> Any:
    return None if leaf is None else torch.as_tensor(leaf)[None]


def _checked(inputs: Any, targets: Any) -> Batch:
    count = num_examples(inputs)
    for tree, name in ((inputs, "inputs"), (targets, "targets")):
        for place, leaf in named_leaves(tree):
            if isinstance(leaf, Tensor) and (leaf.ndim == 0 or len(leaf) != count):
                where = f"{name} {place!r}" if place else name
                raise InputError(
                    f"`data` must hold one target per example, and one row of every input: there are {count} examples, "
                    f"and {where} of shape {tuple(leaf.shape)}."
                )
    return inputs, targets


def _joined(batches: list[Batch]) -> Batch:
    try:
        return concatenated([x for x, _ in batches]), concatenated([y for _, y in batches])
    except (InputError, RuntimeError) as error:
        raise InputError(f"The examples of `data` must have one shape to be measured together: {error}.") from error


def in_memory(data: Any) -> Batch | None:
    """Inputs and targets of data that are tensors already, or structures of them."""
    if isinstance(data, Pictures):
        return data.images, data.labels
    if isinstance(data, Mapping):
        return inputs_and_targets(data)
    if not isinstance(data, tuple | list) or len(data) != 2:
        return None
    inputs, targets = data
    if isinstance(targets, Tensor):
        return (inputs, targets) if isinstance(inputs, Tensor | Mapping | tuple | list) else None
    # Two mappings in a list are two batches.
    both = isinstance(data, tuple) and isinstance(targets, Mapping) and isinstance(inputs, Tensor | Mapping)
    return (inputs, targets) if both else None


def _is_map_style(data: Any) -> bool:
    plain = isinstance(data, Tensor | list | tuple | Mapping | str | bytes | IterableDataset)
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def length(data: Any) -> int | None:
    """How many examples there are, where that is known beforehand."""
    pair = in_memory(data)
    if pair is not None:
        return num_examples(pair[0])
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
