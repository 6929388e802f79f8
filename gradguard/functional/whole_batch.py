"""A user's batch as gradguard takes it, for every way in: tokens become embeddings, one leaf is the private one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.preserved import RandomState
from gradguard.functional.structures import Rest, named_leaves, rebuild


def take(function: LossGradient, inputs: Any, targets: Any) -> tuple[LossGradient, Tensor, Rest]:
    """`LossGradient.bind`, with tokens embedded first where the function has an `input_module`.

    Args:
        function: Of the model and the loss.
        inputs: A tensor `(B, *input_shape)`, tokens `(B, T)`, or a structure of tensors with either in it.
        targets: A tensor `(B, ...)`, or a structure of them.

    Returns:
        The function that takes the batch so, the private tensor, and the rest.

    Raises:
        InputError: There is no private leaf, or there are no tokens.
    """
    if function.is_bound or function.input_module is None or _is_embedded(function, inputs):
        return function.bind(inputs, targets)
    before = {id(leaf) for _, leaf in named_leaves(inputs)}
    embedded = function.embed(inputs)
    if not isinstance(embedded, Tensor):
        function = copy(function)
        function.private = next(name for name, leaf in named_leaves(embedded) if id(leaf) not in before)
    return function.bind(embedded, targets)


def replaying(function: LossGradient, state: RandomState | None) -> LossGradient:
    """The same function with the random numbers of a step's forward pass; only `train_mode="as sent"` draws them."""
    if state is None or function.train_mode != "as sent":
        return function
    other = copy(function)
    other.random_state = state
    return other


def _is_embedded(function: LossGradient, inputs: Any) -> bool:
    """Whether the embeddings are in the tokens' place already."""
    leaves = [(name, leaf) for name, leaf in named_leaves(inputs) if isinstance(leaf, Tensor)]
    if function.private is not None and not isinstance(inputs, Tensor):
        leaves = [(name, leaf) for name, leaf in leaves if name == str(function.private)]
    module = function.model.get_submodule(str(function.input_module))
    width = module.embedding_dim if isinstance(module, nn.Embedding) else None
    return any(leaf.is_floating_point() and leaf.ndim == 3 and width in (None, leaf.shape[2]) for _, leaf in leaves)


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """A loader's batch, or a data set's item, as inputs and targets.

    Args:
        batch: A pair of tensors or structures, or a mapping of the model's inputs with `labels` beside them.

    Returns:
        The two.

    Raises:
        InputError: It is neither.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "labels" in batch and len(batch) > 1:
        return {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]
    raise InputError(
        f"a {type(batch).__name__}, not a pair (inputs, targets), each a tensor or a structure of tensors, and not a "
        "mapping with `labels` beside the model's inputs"
    )


def num_examples(tree: Any) -> int:
    """How many examples a batch's inputs hold: the rows of their first tensor that has rows; 0 without one."""
    return next((len(leaf) for _, leaf in named_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def rows_of_tree(tree: Any, rows: slice, count: int) -> Any:
    """`tree` with the given rows of each tensor that has one per example, of `count`; other leaves as they are."""

    def one(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf

    return rebuild(tree, one)


def concatenated(parts: list[Any]) -> Any:
    """Several batches' inputs (or targets), of one structure, as one.

    Args:
        parts: Tensors with the batch first, or structures of them.

    Returns:
        One behind the other; a leaf that is no tensor with rows is the first part's.

    Raises:
        InputError: They are of different structures or shapes.
    """
    if len(parts) == 1:
        return parts[0]
    leaves = [named_leaves(part) for part in parts]
    names = {tuple(name for name, _ in own) for own in leaves}
    shapes = {tuple(tuple(getattr(leaf, "shape", ()))[1:] for _, leaf in own) for own in leaves}
    if len(names) > 1 or len(shapes) > 1:
        found = sorted(str(s[0] if len(s) == 1 else s) for s in shapes) if len(names) == 1 else sorted(map(str, names))
        raise InputError(f"they differ in shape or structure ({found})")
    columns = zip(*([leaf for _, leaf in own] for own in leaves), strict=True)
    joined = iter([torch.cat(c) if isinstance(c[0], Tensor) and c[0].ndim else c[0] for c in map(list, columns)])
    return rebuild(parts[0], lambda leaf: next(joined))


def moved(tree: Any, device: torch.device) -> Any:
    """Every tensor on the device."""
    return rebuild(tree, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)
