"""Convolutions of sequences and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.functional.layers.base import BilinearLayer, MatrixLayer, per_example
from gradguard.functional.layers.registry import LayerExample, register_layer


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
        return per_example(biases, len(k)).reshape(-1, biases.shape[-1], *[1] * (k.ndim - 2))

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


def _as_2d(a: Tensor) -> Tensor:
    """A sequence as a picture of height 1."""
    return a if a.ndim == 4 else a[:, :, None]


def _two(part: Sequence[int], fill: int) -> tuple[int, int]:
    """A geometry in one dimension as one in two, of height 1."""
    return (fill, part[0]) if len(part) == 1 else (part[0], part[1])


def _examples() -> list[LayerExample]:
    return [
        (nn.Conv1d(2, 4, 3, padding=1), (2, 6)),
        (nn.Conv1d(4, 4, 3, dilation=2, groups=2, bias=False), (4, 7)),
        (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
        (nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), (4, 6, 6)),
        (nn.Conv2d(3, 3, 3, dilation=2, padding=(2, 1), groups=3), (3, 6, 6)),
    ]


@register_layer(nn.Conv1d, nn.Conv2d, examples=_examples)
def convolution(module: nn.Conv1d | nn.Conv2d, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """Padded with zeros by numbers; others go another way."""
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return ConvLayer(module, weight_name, bias_name) if plain else None
