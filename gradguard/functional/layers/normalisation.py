"""The scales and shifts of normalisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradguard.functional.layers.base import BilinearLayer, per_example
from gradguard.functional.layers.registry import LayerExample, register_layer


class ScaleLayer(BilinearLayer):
    """The scale of a normalisation, `z = w * a`, where `a` is the normalised input: one weight per channel.

    Args:
        module: As in `BilinearLayer`.
        weight_name: The same.
        bias_name: The same.
        normalise: `x -> a`.
        trailing: Whether the weight goes with the last axes (LayerNorm) or with axis 1.
    """

    def __init__(
        self,
        module: Any,
        weight_name: str | None,
        bias_name: str | None,
        normalise: Callable[[Tensor], Tensor],
        trailing: bool,
    ) -> None:
        super().__init__(module, weight_name, bias_name)
        self.normalise, self.trailing = normalise, trailing

    def operand(self, x: Tensor, examples: int) -> Tensor:
        """The normalised input."""
        return self.normalise(x)

    def linear(self, a: Tensor, weight: Tensor) -> Tensor:
        """`w * a`."""
        return a * self.spread_bias(weight[None], a)

    def outer(self, a: Tensor, k: Tensor, problems: int) -> Tensor:
        """The sum of `k * a` over positions."""
        return self.sum_bias(k * a, problems)

    def apply(self, weights: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`v * k` and `v * a`."""
        scale = self.spread_bias(weights, a)
        return scale * k, scale * a

    def sum_bias(self, k: Tensor, problems: int) -> Tensor:
        """Summed over everything but the channels."""
        shape = self._weight.shape
        if self.trailing:
            return k.reshape(problems, -1, *shape).sum(1)
        return k.reshape(*k.shape[:2], -1).sum(-1).reshape(problems, -1, *shape).sum(1)

    def spread_bias(self, biases: Tensor, k: Tensor) -> Tensor:
        """Per problem, at every position."""
        shape = biases.shape[1:]
        spread = per_example(biases, len(k))
        ones = [1] * (k.ndim - 1 - len(shape))
        return spread.reshape(-1, *ones, *shape) if self.trailing else spread.reshape(-1, *shape, *ones)


def _batch_normalised(module: Any, x: Tensor) -> Tensor:
    """With the running statistics: a fixed affine map, so nothing of `x` is kept."""
    shape = (-1, *[1] * (x.ndim - 2))
    scale = torch.rsqrt(module.running_var + module.eps).reshape(shape)
    return (x - module.running_mean.reshape(shape)) * scale


def _batch_norms() -> list[LayerExample]:
    kinds = [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm1d(3), (3, 4)), (nn.BatchNorm2d(2), (2, 3, 3))]
    kinds.append((nn.BatchNorm3d(2), (2, 2, 2, 3)))
    for module, _ in kinds:
        assert module.running_mean is not None
        assert module.running_var is not None
        module.eval()
        module.running_mean += 0.3
        module.running_var *= 1.7
    return list(kinds)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, examples=_batch_norms)
def batch_norm(module: _BatchNorm, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """With running statistics; with the batch's own, examples are not apart."""
    if module.training or module.running_mean is None:
        return None
    return ScaleLayer(module, weight_name, bias_name, lambda x: _batch_normalised(module, x), trailing=False)


def _group_norms() -> list[LayerExample]:
    return [(nn.GroupNorm(2, 4), (4, 3)), (nn.GroupNorm(1, 3, affine=False), (3, 2, 2))]


@register_layer(nn.GroupNorm, examples=_group_norms)
def group_norm(module: nn.GroupNorm, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """Each example's groups of channels."""

    def normalise(x: Tensor) -> Tensor:
        return F.group_norm(x, module.num_groups, eps=module.eps)

    return ScaleLayer(module, weight_name, bias_name, normalise, trailing=False)


def _layer_norms() -> list[LayerExample]:
    return [(nn.LayerNorm(4), (4,)), (nn.LayerNorm((2, 3)), (3, 2, 3)), (nn.LayerNorm(4, bias=False), (2, 4))]


@register_layer(nn.LayerNorm, examples=_layer_norms)
def layer_norm(module: nn.LayerNorm, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """Each position's last axes."""

    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)

    return ScaleLayer(module, weight_name, bias_name, normalise, trailing=True)
