"""Batches that are more than one tensor: tuples, dictionaries and Hugging Face's `ModelOutput`.

One leaf of the inputs is *private*: what an attacker looks for. The other leaves (an attention mask, a second input)
and the targets are known. Inside gradguard a batch is a pair: the private tensor, and the *rest*: the targets alone
where there is nothing else, else a dictionary of the tensors that have a row per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradguard.errors import InputError

#: The targets, or the targets and the known inputs by name: each with a row per example.
Rest = Any

TARGETS, INPUTS = "targets", "inputs"


@dataclass(frozen=True)
class Hole:
    """Where a leaf was that has a row per example.

    Args:
        name: Of the leaf in the rest; `None` for the private one.
    """

    name: str | None


@dataclass(frozen=True)
class Template:
    """A batch's structure: how a model is called, and what its loss gets, once the holes are filled.

    Args:
        inputs: The inputs, a `Hole` in the place of each tensor with a row per example.
        targets: The targets, likewise.
        private: What the private leaf is called, for messages.
        known: Names of the floating-point leaves that are taken as known.
    """

    inputs: Any
    targets: Any
    private: str
    known: tuple[str, ...] = ()

    def fill(self, private: Tensor, rest: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """Inputs and targets with the holes filled."""

        def filled(leaf: Any) -> Any:
            if not isinstance(leaf, Hole):
                return leaf
            return private if leaf.name is None else rest[leaf.name]

        return pytree.tree_map(filled, self.inputs), self.fill_targets(rest)

    def fill_targets(self, rest: Mapping[str, Tensor]) -> Any:
        """The targets with the holes filled."""

        def filled(leaf: Any) -> Any:
            return rest[leaf.name] if isinstance(leaf, Hole) and leaf.name is not None else leaf

        return pytree.tree_map(filled, self.targets)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf and its name: `"pixel_values"` in a dictionary, `"1"` in a tuple, `"a.0"` where they are nested."""

    def walk(node: Any, path: str) -> list[tuple[str, Any]]:
        if isinstance(node, Mapping):
            items = [(str(key), value) for key, value in node.items()]
        elif isinstance(node, tuple | list):
            items = [(str(index), value) for index, value in enumerate(node)]
        else:
            return [(path, node)]
        return [leaf for key, value in items for leaf in walk(value, f"{path}.{key}" if path else key)]

    return walk(tree, "")


def split(inputs: Any, targets: Any, private: str | int | None) -> tuple[Template, Tensor, Rest]:
    """Take a structured batch apart.

    Args:
        inputs: Tuple, list, mapping of tensors (with the batch first), or a tensor.
        targets: A tensor, or a structure of tensors.
        private: The name or position of the private leaf; default: the first floating-point tensor.

    Returns:
        The template, the private leaf `(B, *shape)`, and the rest.

    Raises:
        InputError: There is no such leaf, or none with a derivative.
    """
    leaves = [(name, leaf) for name, leaf in named_leaves(inputs) if isinstance(leaf, Tensor)]
    floating = [name for name, leaf in leaves if leaf.is_floating_point()]
    wanted = str(private) if private is not None else (floating[0] if floating else None)
    if wanted is None:
        raise InputError(
            "`inputs` hold no floating-point tensor, so nothing has a derivative by them. For tokens, pass "
            "`input_module=` and the embeddings in the tokens' place (`loss_gradient.embed`)."
        )
    chosen = dict(leaves).get(wanted)
    if chosen is None or not chosen.is_floating_point():
        raise InputError(f"`private={private!r}` names no floating-point tensor of the inputs; there are {floating}.")
    if chosen.ndim == 0:
        raise InputError(f"The private input {wanted!r} is a single number; it must be (B, *shape).")
    count = len(chosen)
    rest: dict[str, Tensor] = {}

    def holes(tree: Any, part: str) -> Any:
        names = iter([name for name, _ in named_leaves(tree)])

        def one(leaf: Any) -> Any:
            name = next(names)
            if part == INPUTS and name == wanted:
                return Hole(None)
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count:
                key = f"{part}.{name}" if name else part
                rest[key] = leaf
                return Hole(key)
            return leaf

        return rebuild(tree, one)

    template = Template(
        holes(inputs, INPUTS), holes(targets, TARGETS), wanted, tuple(name for name in floating if name != wanted)
    )
    return template, chosen, rest


def rebuild(tree: Any, function: Callable[[Any], Any]) -> Any:
    """`tree` with `function` applied to its leaves, in the order of `named_leaves`; mappings become dictionaries."""
    if isinstance(tree, Mapping):
        return {key: rebuild(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [rebuild(value, function) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return type(tree)(values)
    return function(tree)


# ---------------------------------------------------------------------- rows


def map_rest(function: Callable[[Tensor], Tensor], rest: Rest) -> Rest:
    """`function` of every tensor of the rest."""
    return {name: function(part) for name, part in rest.items()} if isinstance(rest, dict) else function(rest)


def rows_of(rest: Rest, index: Any) -> Rest:
    """The rows `index` of the rest."""
    return map_rest(lambda part: part[index], rest)


def stacked(parts: list[Rest]) -> Rest:
    """Several rests of one structure, one behind the other along a new first axis."""
    if isinstance(parts[0], dict):
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return torch.stack(parts)


def targets_of(rest: Rest) -> Tensor | None:
    """The targets where they are one tensor, else `None`."""
    if isinstance(rest, Tensor):
        return rest
    parts = [part for name, part in rest.items() if name.split(".")[0] == TARGETS]
    return parts[0] if len(parts) == 1 else None


# ---------------------------------------------------------------------- outputs


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every leaf: of tuples, mappings, `ModelOutput` and whatever PyTorch knows, and of dataclasses."""

    def one(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return function(leaf)
        return replace(leaf, **{f.name: tree_map(function, getattr(leaf, f.name)) for f in fields(leaf) if f.init})

    return pytree.tree_map(one, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves, in the order of `tree_map`."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def map_rows(function: Callable[[Tensor], Tensor], outputs: Any, count: int) -> Any:
    """`function` of every tensor of a model's outputs that has `count` rows; everything else as it is."""

    def one(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == count
        return function(leaf) if has_rows else leaf

    return tree_map(one, outputs)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def with_rows(whole: Any, part: Any, rows: Tensor, count: int) -> Any:
    """The outputs of a batch with those of some examples replaced.

    Args:
        whole: The outputs of all `count` examples.
        part: The outputs of the examples `rows`.
        rows: Indices, `(K,)`.
        count: Examples of the whole batch.

    Returns:
        Outputs in the structure of `part`, with `count` rows where the leaf of `whole` has them.

    Raises:
        InputError: The two are not of one structure.
    """
    old, new = tree_leaves(whole), tree_leaves(part)
    if len(old) != len(new):
        raise InputError("The model's outputs have another structure for some examples than for the whole batch.")
    pairs = iter(zip(old, new, strict=True))

    def one(leaf: Any) -> Any:
        before, after = next(pairs)
        if not (isinstance(before, Tensor) and before.ndim and len(before) == count and isinstance(after, Tensor)):
            return after
        if len(rows) > 1:
            return before.index_copy(0, rows, after.to(before.dtype))
        # A choice by a mask, which can be mapped over.
        chosen = torch.arange(count, device=before.device) == rows
        return torch.where(chosen.reshape(-1, *[1] * (before.ndim - 1)), after.to(before.dtype), before)

    return tree_map(one, part)


def is_structured(value: Any) -> bool:
    """Whether a batch's part is more than a tensor."""
    return isinstance(value, Mapping | tuple | list) and not isinstance(value, torch.Size)
