"""What products with the Jacobian are taken of: problems, each a few examples that are unknown together.

`R` problems of `n` examples each. Where a problem is one example of a batch, its loss is the *batch's* loss as a
function of that example's outputs, the others' as they are: the weight that the loss gives the example (class weights,
padding, sums) is then in it, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.structures import (
    Rest,
    map_rest,
    map_rows,
    output_tensors,
    rows_of,
    targets_of,
    with_rows,
)
from gradguard.functional.vectors import Gradient

#: Losses that are a weighted sum over examples by what they are: other examples' outputs do not matter.
SEPARABLE = {
    *(nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss, nn.BCELoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss),
    *(nn.HuberLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss, nn.MultiMarginLoss),
    *(F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss),
}


@dataclass(frozen=True)
class Batch:
    """The batch that single examples are part of.

    Args:
        inputs: `(B, *input_shape)`.
        rest: Its rest, see `gradguard.functional.structures`.
        outputs: The model's outputs on it, without a graph.
    """

    inputs: Tensor
    rest: Rest
    outputs: Any

    @property
    def count(self) -> int:
        """`B`."""
        return len(self.inputs)


@dataclass(frozen=True)
class Problems:
    """`R` problems at one point.

    Args:
        function: The loss gradient, bound to the batch's structure.
        parameters: Where, as `function.parameters()`.
        inputs: `(R, n, *input_shape)`.
        rest: `(R, n, ...)`.
        batch: The batch that problem `r` is the example `rows[r]` of; `None`: each problem is a batch of its own.
        rows: `(R,)`.
        distinct: Whether no two problems are the same example.
    """

    function: LossGradient
    parameters: Gradient
    inputs: Tensor
    rest: Rest
    batch: Batch | None = None
    rows: Tensor | None = None
    distinct: bool = True

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, index: slice | Tensor) -> Problems:
        """Some of the problems."""
        rows = None if self.rows is None else self.rows[index]
        return replace(self, inputs=self.inputs[index], rest=rows_of(self.rest, index), rows=rows)

    @property
    def row_or_zero(self) -> Tensor:
        """`rows`, or zeros where there is no batch: something to map over."""
        if self.rows is not None:
            return self.rows
        return torch.zeros(len(self), dtype=torch.int64, device=self.inputs.device)

    def loss(self, parameters: Gradient, inputs: Tensor, rest: Rest, row: Tensor) -> Tensor:
        """One problem's loss: `inputs` `(n, *input_shape)`."""
        if self.batch is None:
            return self.function.loss(parameters, inputs, rest)
        return self._loss_of_one(self.function.outputs(parameters, inputs, rest), row)

    def loss_of_all(self, outputs: Any, rest: Rest) -> Tensor:
        """The sum of all problems' losses, from the outputs of all their examples `(R n, ...)`."""
        problems, examples = self.inputs.shape[:2]
        if self.batch is not None:
            assert self.rows is not None, "problems of a batch know which example they are"
            if self.distinct:
                return self.function.loss_of(
                    with_rows(self.batch.outputs, outputs, self.rows, self.batch.count), self.batch.rest
                )
            apart = map_rows(lambda o: o[:, None], outputs, problems)
            return _sum_of_each(self._loss_of_one, problems, apart, self.rows)
        if problems == 1:
            return self.function.loss_of(outputs, map_rest(lambda part: part[0], rest))
        apart = map_rows(lambda o: o.unflatten(0, (problems, examples)), outputs, problems * examples)
        return _sum_of_each(self.function.loss_of, problems, apart, rest)

    def _loss_of_one(self, outputs: Any, row: Tensor) -> Tensor:
        """The batch's loss with the outputs of one example replaced."""
        assert self.batch is not None
        return self.function.loss_of(
            with_rows(self.batch.outputs, outputs, row.reshape(1), self.batch.count), self.batch.rest
        )

    @cached_property
    def is_separable(self) -> bool:
        """Whether the loss takes the examples of the batch one by one: `d^2 l / do_r do_s = 0` for `r != s`.

        By the loss's class, else by its second derivatives at the batch's outputs: for every bit of an example's index,
        moving the outputs of the examples with that bit must not move the slopes of those without.

        Returns:
            `True` also where each problem is a batch of its own.
        """
        if self.batch is None or self.batch.count == 1:
            return True
        return has_separable_loss(self.function, self.batch)


def _sum_of_each(loss_of: Callable[..., Tensor], count: int, outputs: Any, known: Any) -> Tensor:
    """The sum of `count` losses, of rows of `outputs` and `known`."""
    try:
        return vmap(loss_of)(outputs, known).sum()
    except (RuntimeError, ValueError):
        # A loss that cannot be mapped over (it asks for a number, or has outputs without rows): one by one.
        each = [loss_of(map_rows(itemgetter(r), outputs, count), rows_of(known, r)) for r in range(count)]
        return torch.stack(each).sum()


def is_separable_by_class(function: LossGradient, rest: Rest) -> bool:
    """Whether the loss is one of those in torch that are sums over examples, whatever the outputs."""
    loss_fn = function.loss_fn
    known = (type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn) in SEPARABLE
    return known and isinstance(targets_of(rest), Tensor)


def has_separable_loss(function: LossGradient, batch: Batch) -> bool:
    """See `Problems.is_separable`."""
    if is_separable_by_class(function, batch.rest):
        return True
    count = batch.count
    with torch.enable_grad():
        outputs = map_rows(_leaf, batch.outputs, count)
        leaves = [o for o in output_tensors(outputs) if o.requires_grad]
        if not leaves:
            return False
        slopes = torch.autograd.grad(
            function.loss_of(outputs, batch.rest), leaves, create_graph=True, materialize_grads=True
        )
        curved = [s for s in slopes if s.requires_grad]
        if not curved:
            return True
        index = torch.arange(count, device=leaves[0].device)
        for bit in range((count - 1).bit_length()):
            chosen = (index >> bit) & 1 == 1
            # Weights of its own for each element, so that nothing cancels.
            probes = [_waves(s) * _like_rows(chosen, s) for s in curved]
            moved = torch.autograd.grad(curved, leaves, probes, retain_graph=True, materialize_grads=True)
            for change in moved:
                size = change.abs().max()
                others = (change * _like_rows(~chosen, change)).abs().max()
                if bool(others > 100 * torch.finfo(change.dtype).eps * size):
                    return False
    return True


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True) if tensor.is_floating_point() else tensor


def _waves(like: Tensor) -> Tensor:
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (1.5 + torch.cos(1.7 * index + 0.3)).reshape(like.shape).to(like)


def _like_rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)
