"""Layers whose output is linear in the weight and in the input, so that a weight's gradient is an outer product.

`z = L(W, a) + b` with `L` bilinear (a matrix product, a convolution, a channel's scale): the gradient by `W` is
`outer(a, k)` with `k = dl/dz`, and by `b` it is the sum of `k`. Products with per-example gradients then need `a` and
`k` only, and no vector with `P` elements per example: `<outer(a, k), outer(a', k')>` is the sum of the products of two
small Gram matrices ("ghost" products, Li et al. 2022, arXiv 2110.05679, section 4).

Letters: `R` problems of one or more examples each; `N` examples of all problems together, in the problems' order; `G`
groups of channels; `I` inputs and `O` outputs of a group; `T` positions (pixels, tokens) of a problem's examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BilinearLayer(ABC):
    """One module, called as `layer(a)` with `a = layer.operand(x)` instead of `module(x)`.

    `weight`, `bias`: its parameters as they are when the layer is built, `None` for one that is not there;
    `weight_name`, `bias_name`: their names, `None` for one that is not trained.
    """

    def __init__(self, module: Any, weight_name: str | None, bias_name: str | None) -> None:
        self.module, self.weight_name, self.bias_name = module, weight_name, bias_name
        # Constants: whatever else depends on a parameter then shows in autograd's graph.
        self.weight: Tensor | None = _detached(module._parameters.get("weight"))
        self.bias: Tensor | None = _detached(module._parameters.get("bias"))

    @property
    def _weight(self) -> Tensor:
        assert self.weight is not None, "asked only of a layer whose weight is trained"
        return self.weight

    def operand(self, x: Tensor) -> Tensor:
        """`a`, what the weight multiplies: `(N, ...)`."""
        return x

    def __call__(self, a: Tensor) -> Tensor:
        """The module's output `z` `(N, ...)`, differentiable by `a` as often as one likes; not by the parameters."""
        z = a if self.weight is None else self.linear(a, self.weight)
        return z if self.bias is None else z + self.spread_bias(self.bias[None], z)

    @abstractmethod
    def linear(self, a: Tensor, weight: Tensor) -> Tensor:
        """`L(W, a)`."""

    @abstractmethod
    def outer(self, a: Tensor, k: Tensor, problems: int) -> Tensor:
        """The gradient by the weight: `(R, *weight_shape)`."""

    @abstractmethod
    def apply(self, weights: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`L(V_r, .)^T k` and `L(V_r, a)`, shapes of `a` and `k`, for one weight per problem: `(R, *weight_shape)`.

        With `R = 1` the same weight serves all examples.
        """

    def change(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> Tensor:
        """How the gradient by the weight changes when `a` and `k` move by `da` and `dk`: `(R, *weight_shape)`."""
        return self.outer(da, k, problems) + self.outer(a, dk, problems)

    def gram(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> tuple[Tensor, Tensor]:
        """`apply` to the weights `change(a, k, da, dk)`."""
        return self.apply(self.change(a, k, da, dk, problems), a, k)

    @abstractmethod
    def sum_bias(self, k: Tensor, problems: int) -> Tensor:
        """The gradient by the bias: `(R, *bias_shape)`."""

    @abstractmethod
    def spread_bias(self, biases: Tensor, k: Tensor) -> Tensor:
        """The transpose of `sum_bias`: `(R, *bias_shape)`, broadcastable to the shape of `k`."""


class MatrixLayer(BilinearLayer):
    """`z = V X` with `V` `(G, O, I)` and `X` `(R, G, I, T)`: what linear layers and convolutions share."""

    @abstractmethod
    def columns(self, a: Tensor, problems: int) -> Tensor:
        """`X`: `(R, G, I, T)`."""

    @abstractmethod
    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """The transpose of `columns`: shape of `a`."""

    @abstractmethod
    def signals(self, k: Tensor, problems: int) -> Tensor:
        """`k` as `(R, G, O, T)`."""

    @abstractmethod
    def unsignals(self, signals: Tensor, like: Tensor) -> Tensor:
        """The inverse of `signals`: shape of `k`."""

    @abstractmethod
    def matrices(self, weights: Tensor) -> Tensor:
        """`(R, *weight_shape)` as `(R, G, O, I)`."""

    def outer(self, a: Tensor, k: Tensor, problems: int) -> Tensor:
        """`k X^T`, problem by problem."""
        product = self.signals(k, problems) @ self.columns(a, problems).mT
        return product.reshape(problems, *self._weight.shape)

    def apply(self, weights: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`V^T k` and `V X`."""
        matrices, problems = self.matrices(weights), len(weights)
        to_columns = matrices.mT @ self.signals(k, problems)
        return self.uncolumns(to_columns, a), self.unsignals(matrices @ self.columns(a, problems), k)

    def gram(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> tuple[Tensor, Tensor]:
        """Through the Gram matrices of the positions (`T x T`) where that is less work than through `V` (`O x I`)."""
        if not self.ghost(a, k, problems):
            return super().gram(a, k, da, dk, problems)
        x, dx = self.columns(a, problems), self.columns(da, problems)
        s, ds = self.signals(k, problems), self.signals(dk, problems)
        to_signals = ds @ (x.mT @ x) + s @ (dx.mT @ x)
        to_columns = x @ (ds.mT @ s) + dx @ (s.mT @ s)
        return self.uncolumns(to_columns, a), self.unsignals(to_signals, k)

    def ghost(self, a: Tensor, k: Tensor, problems: int) -> bool:
        """Whether the `T x T` way takes fewer multiplications."""
        _, outputs, inputs = self.matrices(self._weight[None])[0].shape
        positions = k.numel() // (problems * len(self._weight))
        return 3 * positions * (inputs + outputs) < 4 * inputs * outputs


class LinearLayer(MatrixLayer):
    """`nn.Linear`: `a` is `(N, *positions, I)`."""

    def linear(self, a: Tensor, weight: Tensor) -> Tensor:
        """`a W^T`."""
        return a @ weight.mT

    def columns(self, a: Tensor, problems: int) -> Tensor:
        """`(R, 1, I, T)`."""
        return a.reshape(problems, 1, -1, a.shape[-1]).mT

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Shape of `like`."""
        return columns.mT.reshape(like.shape)

    def signals(self, k: Tensor, problems: int) -> Tensor:
        """`(R, 1, O, T)`."""
        return self.columns(k, problems)

    def unsignals(self, signals: Tensor, like: Tensor) -> Tensor:
        """Shape of `like`."""
        return self.uncolumns(signals, like)

    def matrices(self, weights: Tensor) -> Tensor:
        """`(R, 1, O, I)`."""
        return weights[:, None]

    def sum_bias(self, k: Tensor, problems: int) -> Tensor:
        """`(R, O)`."""
        return k.reshape(problems, -1, k.shape[-1]).sum(1)

    def spread_bias(self, biases: Tensor, k: Tensor) -> Tensor:
        """Per problem, at every position."""
        return _per_example(biases, len(k)).reshape(-1, *[1] * (k.ndim - 2), biases.shape[-1])


class ConvLayer(MatrixLayer):
    """`nn.Conv1d` and `nn.Conv2d`, padded with zeros: `a` is `(N, channels, *spatial)`."""

    def __init__(self, module: Any, weight_name: str | None, bias_name: str | None) -> None:
        super().__init__(module, weight_name, bias_name)
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.convolution = F.conv1d if len(module.kernel_size) == 1 else F.conv2d

    def linear(self, a: Tensor, weight: Tensor) -> Tensor:
        """The convolution as a linear map: PyTorch's own double backward computes products that nobody asked for."""
        like = torch.empty_like(a[:1]).expand(a.shape)

        def forward(x: Tensor) -> Tensor:
            return self._convolve(x, weight)

        def transpose(k: Tensor) -> Tensor:
            return self._by_input(k, like, weight)

        return _LinearMap.apply(a, forward, transpose)

    def outer(self, a: Tensor, k: Tensor, problems: int) -> Tensor:
        """Problems as groups of channels of one convolution; on other devices than the CPU, columns."""
        if not _grouped_convolutions(a, problems):
            return super().outer(a, k, problems)
        return self._by_weight(_merged(k, problems), _merged(a, problems), problems)

    def change(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> Tensor:
        """Both outer products in one: the sum over examples is taken anyway."""
        if not _grouped_convolutions(a, problems):
            return super().change(a, k, da, dk, problems)
        operands = torch.cat([_merged(da, problems), _merged(a, problems)])
        signals = torch.cat([_merged(k, problems), _merged(dk, problems)])
        return self._by_weight(signals, operands, problems)

    def apply(self, weights: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """As `outer`."""
        problems = len(weights)
        if not _grouped_convolutions(a, problems):
            return super().apply(weights, a, k)
        merged, operands, signals = weights.flatten(0, 1), _merged(a, problems), _merged(k, problems)
        to_a = self._by_input(signals, operands, merged)
        to_k = self._convolve(operands, merged)
        return _unmerged(to_a, problems, a), _unmerged(to_k, problems, k)

    def columns(self, a: Tensor, problems: int) -> Tensor:
        """Patches: `(R, G, channels / G * taps, T)`."""
        geometry = [_two(part, fill) for part, fill in zip(self._unfold_geometry(), (1, 1, 0, 1), strict=True)]
        patches = F.unfold(_as_2d(a), geometry[0], geometry[1], geometry[2], geometry[3])
        return self._grouped(patches, problems)

    def uncolumns(self, columns: Tensor, like: Tensor) -> Tensor:
        """Patches added up where they overlap."""
        geometry = [_two(part, fill) for part, fill in zip(self._unfold_geometry(), (1, 1, 0, 1), strict=True)]
        patches = self._ungrouped(columns, len(like))
        shape = _as_2d(like).shape[-2:]
        return F.fold(patches, shape, geometry[0], geometry[1], geometry[2], geometry[3]).reshape(like.shape)

    def signals(self, k: Tensor, problems: int) -> Tensor:
        """`(R, G, O, T)`."""
        return self._grouped(k.flatten(2), problems)

    def unsignals(self, signals: Tensor, like: Tensor) -> Tensor:
        """Shape of `like`."""
        return self._ungrouped(signals, len(like)).reshape(like.shape)

    def matrices(self, weights: Tensor) -> Tensor:
        """`(R, G, O, channels / G * taps)`."""
        return weights.flatten(2).unflatten(1, (self.module.groups, -1))

    def sum_bias(self, k: Tensor, problems: int) -> Tensor:
        """`(R, channels)`."""
        return k.flatten(2).sum(-1).reshape(problems, -1, k.shape[1]).sum(1)

    def spread_bias(self, biases: Tensor, k: Tensor) -> Tensor:
        """Per problem, at every pixel."""
        return _per_example(biases, len(k)).reshape(-1, biases.shape[-1], *[1] * (k.ndim - 2))

    def _grouped(self, matrix: Tensor, problems: int) -> Tensor:
        """`(N, channels, T / n)` as `(R, G, channels / G, T)`."""
        groups, (_, channels, positions) = self.module.groups, matrix.shape
        if len(matrix) == problems:
            return matrix.reshape(problems, groups, channels // groups, positions)
        parts = matrix.reshape(problems, -1, groups, channels // groups, positions)
        return parts.movedim(1, 3).flatten(3)

    def _ungrouped(self, matrices: Tensor, examples: int) -> Tensor:
        """The inverse of `_grouped`."""
        problems, groups, channels, _ = matrices.shape
        if examples == problems:
            return matrices.reshape(examples, groups * channels, -1)
        parts = matrices.unflatten(3, (examples // problems, -1)).movedim(3, 1)
        return parts.reshape(examples, groups * channels, -1)

    def _unfold_geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        """Kernel, dilation, padding, stride: the order of `F.unfold`."""
        return self.module.kernel_size, self.dilation, self.padding, self.stride

    def _convolve(self, a: Tensor, weight: Tensor) -> Tensor:
        return self.convolution(a, weight, None, *self._geometry(a, weight))

    def _by_input(self, k: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `<k, conv(a, weight)>` by `a`."""
        return self._backward(k, a, weight, [True, False, False])[0]

    def _by_weight(self, k: Tensor, a: Tensor, problems: int) -> Tensor:
        """The gradient by the weights of problems that are merged into channels: `(R, *weight_shape)`."""
        shape = self._weight.shape
        merged = k.new_empty(problems * shape[0], *shape[1:])  # only its shape matters
        return self._backward(k, a, merged, [False, True, False])[1].reshape(problems, *shape)

    def _backward(self, k: Tensor, a: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        stride, padding, dilation, groups = self._geometry(a, weight)
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            k, a, weight, None, stride, padding, dilation, False, zeros, groups, mask
        )

    def _geometry(self, a: Tensor, weight: Tensor) -> tuple[Any, Any, Any, int]:
        return self.stride, self.padding, self.dilation, a.shape[1] // weight.shape[1]


class ScaleLayer(BilinearLayer):
    """The scale of a normalisation, `z = w * a`, where `a` is the normalised input: one weight per channel.

    `normalise`: `x -> a`. `trailing`: whether the weight goes with the last axes (LayerNorm) or with axis 1.
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

    def operand(self, x: Tensor) -> Tensor:
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
        spread = _per_example(biases, len(k))
        ones = [1] * (k.ndim - 1 - len(shape))
        return spread.reshape(-1, *ones, *shape) if self.trailing else spread.reshape(-1, *shape, *ones)


class EmbeddingLayer(BilinearLayer):
    """`nn.Embedding` of positions, or of tokens that are no input: `a` are indices `(N, *positions)`."""

    @staticmethod
    def for_each(indices: Tensor, examples: int) -> Tensor:
        """Indices that serve all examples, `(T,)` or `(1, T)`, once for each, so that each gets its own gradient."""
        indices = indices[None] if indices.ndim == 1 else indices
        return indices.expand(examples, *indices.shape[1:]) if len(indices) == 1 else indices

    def __call__(self, a: Tensor) -> Tensor:
        """The rows of the table."""
        return self.linear(a, self._weight)

    def linear(self, a: Tensor, weight: Tensor) -> Tensor:
        """The rows of the table."""
        return F.embedding(a, weight)

    def outer(self, a: Tensor, k: Tensor, problems: int) -> Tensor:
        """`k` added to the rows that were looked up."""
        table = k.new_zeros(problems, *self._weight.shape)
        index = a.reshape(problems, -1, 1).expand(-1, -1, k.shape[-1])
        return table.scatter_add_(1, index, k.reshape(problems, -1, k.shape[-1]))

    def change(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> Tensor:
        """Indices do not move."""
        return self.outer(a, dk, problems)

    def apply(self, weights: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Indices have no derivative; the rows of `V`."""
        problems = len(weights)
        index = a.reshape(problems, -1, 1).expand(-1, -1, k.shape[-1])
        return torch.zeros_like(a), weights.gather(1, index).reshape(k.shape)

    def gram(self, a: Tensor, k: Tensor, da: Tensor, dk: Tensor, problems: int) -> tuple[Tensor, Tensor]:
        """`dk` summed over the positions with the same index, without the table."""
        index = a.reshape(problems, -1)
        same = (index[:, :, None] == index[:, None, :]).to(k.dtype)
        return torch.zeros_like(a), (same @ dk.reshape(problems, -1, k.shape[-1])).reshape(k.shape)

    def sum_bias(self, k: Tensor, problems: int) -> Tensor:
        """There is no bias."""
        raise NotImplementedError

    def spread_bias(self, biases: Tensor, k: Tensor) -> Tensor:
        """There is no bias."""
        raise NotImplementedError


#: What `bilinear_layer` looks at.
BILINEAR_MODULES = (_BatchNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


def bilinear_layer(module: nn.Module, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """The layer that `module` is now, or `None` if it is none of these.

    `weight_name`, `bias_name`: of the parameters that are trained.
    """
    kind, names = type(module), (weight_name, bias_name)
    if isinstance(module, _BatchNorm):
        if module.training or module.running_mean is None:
            return None
        return ScaleLayer(module, *names, lambda x: _batch_normalised(module, x), trailing=False)
    # Exactly these types: a subclass may compute something else.
    if kind is nn.Linear:
        return LinearLayer(module, *names)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and kind in (nn.Conv1d, nn.Conv2d):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return ConvLayer(module, *names) if plain else None
    if isinstance(module, nn.GroupNorm) and kind is nn.GroupNorm:
        return ScaleLayer(module, *names, lambda x: F.group_norm(x, module.num_groups, eps=module.eps), trailing=False)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        shape = module.normalized_shape
        return ScaleLayer(module, *names, lambda x: F.layer_norm(x, shape, eps=module.eps), trailing=True)
    if isinstance(module, nn.Embedding) and kind is nn.Embedding:
        plain = module.max_norm is None and module.padding_idx is None and not module.scale_grad_by_freq
        return EmbeddingLayer(module, weight_name, None) if plain else None
    return None


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _batch_normalised(module: Any, x: Tensor) -> Tensor:
    """With the running statistics: a fixed affine map, so nothing of `x` is kept."""
    shape = (-1, *[1] * (x.ndim - 2))
    scale = torch.rsqrt(module.running_var + module.eps).reshape(shape)
    return (x - module.running_mean.reshape(shape)) * scale


class _LinearMap(torch.autograd.Function):
    """A linear map given with its transpose, each of which is the derivative of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable, transpose: Callable) -> Tensor:
        ctx.maps = forward, transpose
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        forward, transpose = ctx.maps
        return _LinearMap.apply(grads[0], transpose, forward), None, None


def _grouped_convolutions(a: Tensor, problems: int) -> bool:
    """Whether one convolution with a group per problem beats a matrix product with columns: where there is no GPU."""
    return problems == 1 or a.device.type == "cpu"


def _merged(part: Tensor, problems: int) -> Tensor:
    """`(N, channels, *spatial)` as `(N / R, R * channels, *spatial)`."""
    return part.unflatten(0, (problems, -1)).movedim(0, 1).flatten(1, 2)


def _unmerged(merged: Tensor, problems: int, like: Tensor) -> Tensor:
    """The inverse of `_merged`."""
    return merged.unflatten(1, (problems, -1)).movedim(1, 0).reshape(like.shape)


def _per_example(parts: Tensor, examples: int) -> Tensor:
    """One row per problem as one row per example (or one row for all, where there is one problem)."""
    return parts if len(parts) == 1 else parts.repeat_interleave(examples // len(parts), dim=0)


def _as_2d(a: Tensor) -> Tensor:
    """A sequence as a picture of height 1."""
    return a if a.ndim == 4 else a[:, :, None]


def _two(part: Sequence[int], fill: int) -> tuple[int, int]:
    """A geometry in one dimension as one in two, of height 1."""
    return (fill, part[0]) if len(part) == 1 else (part[0], part[1])
