"""A batch's gradient with each example's share in it clipped, without one parameter-sized tensor per example.

Where the model's known layers make up its gradient, norms come from operands and signals ("ghost norms", Li et al.
2022, arXiv 2110.05679, section 4), and the clipped sum from the signals weighted. Elsewhere a few examples at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import UnsupportedModelError
from gradguard.functional.choice import name_of, way_of
from gradguard.functional.layer_by_layer import Call, LayerByLayer
from gradguard.functional.layers.base import MatrixLayer
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.precision import full_precision
from gradguard.functional.problems import Batch, Problems
from gradguard.functional.structures import Rest, map_rest
from gradguard.functional.vectors import Gradient

#: Elements of per-example gradients that are in memory at a time, or one example's where those are more.
ELEMENTS = 2**22

#: From the squared norms `(B, K)` of each example's share in each of `K` tensors to the factors `(B, K)` on them.
Factors = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weighted:
    """What `weighted_gradient` finds.

    Args:
        gradient: the sum of the weighted shares, one tensor per parameter.
        squares: squared norms of the shares before, `(B, K)` in the parameters' order.
    """

    gradient: Gradient
    squares: Tensor


@full_precision()
def weighted_gradient(function: LossGradient, inputs: Tensor, rest: Rest, factors: Factors) -> Weighted:
    """The sum over examples of `factor_r` times the share of example `r` in the batch's gradient.

    Args:
        function: bound to the batch's structure.
        inputs: `(B, *input_shape)`.
        rest: its rest.
        factors: from squared norms to factors, row by row.

    Returns:
        The sum, and the norms.

    Raises:
        UnsupportedModelError: if the model or the loss couples the examples: no share is then of one example alone.
    """
    outputs = function.check_batch(inputs, rest)
    x, known = function.cast(inputs.detach()), function.cast(rest)
    problems = Problems(
        function,
        function.parameters(),
        x[:, None],
        map_rest(lambda part: part[:, None], known),
        batch=Batch(x, known, outputs),
        rows=torch.arange(len(x), device=x.device),
    )
    name = name_of(problems)
    if name == "coupled":
        raise UnsupportedModelError(
            f"{type(function.model).__name__} or its loss mixes the examples of a batch (BatchNorm with the batch's "
            "statistics, a contrastive loss), so no part of the gradient is one example's, and none can be clipped. "
            "Use layers that keep examples apart, as GroupNorm, or clip whole updates: `ClipUpdate`."
        )
    if name == "layer by layer":
        way = way_of(problems, name=name)
        if isinstance(way, LayerByLayer):
            return _layered(way, factors)
    return _chunked(problems, factors)


def _layered(way: LayerByLayer, factors: Factors) -> Weighted:
    parts: dict[str, list[tuple[Call, bool]]] = {n: [] for n in way.parameters}
    for call in way.calls:
        for name, is_weight in ((call.layer.weight_name, True), (call.layer.bias_name, False)):
            if name is not None:
                parts[name].append((call, is_weight))
    squares = torch.stack(
        [_squares(used, p, way.problems) for used, p in zip(parts.values(), way.parameters.values(), strict=True)], 1
    )
    weights = factors(squares)
    total: Gradient = {}
    for i, (name, parameter) in enumerate(way.parameters.items()):
        total[name] = torch.zeros_like(parameter)
        for call, is_weight in parts[name]:
            total[name] += _part(call.a, call.k * _like(weights[:, i], call.k), call, is_weight, 1)[0]
    return Weighted(total, squares)


def _squares(used: list[tuple[Call, bool]], parameter: Tensor, count: int) -> Tensor:
    """Squared norms of each example's gradient by one parameter: `(B,)`."""
    if not used:
        return parameter.new_zeros(count)
    if len(used) == 1:
        call, is_weight = used[0]
        layer = call.layer
        if is_weight and isinstance(layer, MatrixLayer) and layer.ghost(call.a, call.k, count):
            x, s = layer.columns(call.a, count), layer.signals(call.k, count)
            return ((x.mT @ x) * (s.mT @ s)).sum((1, 2, 3)).clamp_min(0)
    step = max(1, ELEMENTS // max(parameter.numel(), 1))
    found = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        each = sum(_part(call.a[rows], call.k[rows], call, w, rows.stop - start) for call, w in used)
        assert isinstance(each, Tensor)
        found.append(each.flatten(1).square().sum(1))
    return torch.cat(found)


def _part(a: Tensor, k: Tensor, call: Call, is_weight: bool, problems: int) -> Tensor:
    return call.layer.outer(a, k, problems) if is_weight else call.layer.sum_bias(k, problems)


def _like(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def _chunked(problems: Problems, factors: Factors) -> Weighted:
    size = sum(p.numel() for p in problems.parameters.values())
    step = max(1, ELEMENTS // max(size, 1))
    total = {n: torch.zeros_like(p) for n, p in problems.parameters.items()}
    squares = []
    for start in range(0, len(problems), step):
        own = way_of(problems.part(slice(start, start + step))).gradients()
        squares.append(torch.stack([g.detach().flatten(1).square().sum(1) for g in own.values()], 1))
        weights = factors(squares[-1])
        for i, (name, g) in enumerate(own.items()):
            total[name] += torch.tensordot(weights[:, i].to(g), g.detach(), dims=1)
    return Weighted(total, torch.cat(squares))
