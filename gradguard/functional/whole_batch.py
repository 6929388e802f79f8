"""A user's batch as gradguard takes it, for every way in: tokens become embeddings, one leaf is the private one."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor, nn

from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.preserved import RandomState
from gradguard.functional.structures import Rest, named_leaves


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
