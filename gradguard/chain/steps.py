"""The steps of a chain: what each computes, its transpose, its inverse.

Letters, beside those of `gradients.py`: a layer has `G` groups of `F` filters each, `T` weights per filter and `L`
positions of the output, so per group `W` is `(F, T)`, the patches are `(T, L)` and `z` and `k = dl/dz` are `(F, L)`.
A linear layer is the case `G = L = 1`. Values here are of one example, without a batch dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.chain.activation import Activation, Shape
from gradguard.chain.rewiring import Padding, Rewire


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A linear or convolutional layer: bilinear in its weight and its input, so each follows from the other two.

    `T` weights per filter, `L` positions, `G` groups of `F` filters.

    Args:
        name: The module's path.
        kind: "Linear" or "Conv2d".
        weight: The name of its weight.
        bias: The name of its bias, or `None`.
        input_shape: Of one example.
        output_shape: Of one example.
        groups: `G`.
        kernel: (height, width), like the following ones.
        stride: Between positions.
        dilation: Between taps.
        padding: Zeros on each side; they are known and no unknowns.
        extra_padding: Zeros at the bottom and right beyond `padding` (an even kernel with "same").
        before: Padding of any kind (reflected, a constant) by what comes before the layer. Its copies and constants are
            no unknowns either.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    input_shape: Shape
    output_shape: Shape
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    extra_padding: tuple[int, int] = (0, 0)
    before: Padding | None = None

    @property
    def unknowns(self) -> int:
        """Elements of the input."""
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return math.prod(self.output_shape)

    @property
    def filters(self) -> int:
        """Output channels (features) of all groups."""
        return self.output_shape[0]

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return self.filters * self.taps

    @property
    def taps(self) -> int:
        """`T`, the weights of one filter."""
        return (self.input_shape[0] // self.groups) * math.prod(self.kernel)

    @property
    def overlap(self) -> int:
        """How many equations the weight constraints `W x = z` and the gradient constraints `grad W = k (*) x` share.

        Row `w_f` against the gradient constraints of `k_g` says the same as `k_g` against the weight constraints of
        `w_f`: `F^2` equations per group, of which `(F - rank w) (F - rank k)` follow from the others. For weights
        and `k` in general position.
        """
        filters = self.filters // self.groups
        free = (filters - min(filters, self.taps)) * (filters - min(filters, self.outputs // self.filters))
        return self.groups * (filters**2 - free)

    def gradient_rank_bound(self) -> int:
        """How many unknowns the weight's gradient alone can determine: each channel has its own equations."""
        channels = self.input_shape[0]
        return channels * min(self.unknowns // channels, self.filters // self.groups * math.prod(self.kernel))

    def rank_bound(self, *, gradients: bool = True, known: Tensor | None = None) -> int:
        """How many unknowns the constraints can at most determine.

        Args:
            gradients: Whether the weight's gradient is sent.
            known: The outputs that are, bool, `output_shape`; `k` is zero at the others. Then a filter without a known
                output has no constraint, and of the overlap only each filter's equation with itself is sure to remain.

        Returns:
            At most `unknowns`.
        """
        if known is None:
            return min(self.unknowns, self.outputs + (self.num_weights - self.overlap if gradients else 0))
        active = int(known.reshape(self.filters, -1).any(1).sum())
        return min(self.unknowns, int(known.sum()) + (active * (self.taps - 1) if gradients else 0))

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The layer's output, bias included: `input_shape -> output_shape`."""
        return (self.matrix(parameters[self.weight]) @ self.patches(x)).reshape(self.output_shape) + self.offset(
            parameters
        )

    def offset(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What is added to the part linear in the input: the bias, and what a constant padding gives."""
        weight = parameters[self.weight]
        constant = self.constant_patches(weight)
        padding = 0.0 if constant is None else (self.matrix(weight) @ constant).reshape(self.output_shape)
        if self.bias is None:
            return weight.new_zeros(()) + padding
        return parameters[self.bias].reshape(-1, *[1] * (len(self.output_shape) - 1)) + padding

    def patches(self, x: Tensor) -> Tensor:
        """What each weight of a filter meets at each position: `input_shape -> (G, T, L)`. Linear in `x`."""
        if self.kind == "Linear":
            return x.reshape(1, -1, 1)
        x = x.reshape(self.input_shape)
        return self._unfolded(x if self.before is None else self.before.spread(x))

    def _unfolded(self, x: Tensor) -> Tensor:
        bottom, right = self.extra_padding
        x = x[None]
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        columns = F.unfold(x, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)
        return columns.reshape(self.groups, -1, columns.shape[-1])

    def constant_patches(self, like: Tensor) -> Tensor | None:
        """What the patches of every input have beside `patches`: those of a constant padding; `None` for nothing."""
        if self.before is None or self.before.fill is None:
            return None
        return self._unfolded(self.before.fill.to(like))

    def unpatches(self, columns: Tensor) -> Tensor:
        """The transpose of `patches`: `(G, T, L) -> input_shape`."""
        if self.kind == "Linear":
            return columns.reshape(self.input_shape)
        height, width = self.input_shape[1:] if self.before is None else self.before.index.shape
        bottom, right = self.extra_padding
        columns = columns.reshape(1, -1, columns.shape[-1])
        padded = (height + bottom, width + right)
        x = F.fold(columns, padded, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)
        x = x[0, :, :height, :width]
        return x if self.before is None else self.before.gather(x, self.input_shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight, or its gradient, in the parameter's shape as `(G, F, T)`."""
        return weight.reshape(self.groups, self.filters // self.groups, -1)

    def rows(self, z: Tensor) -> Tensor:
        """An output, or the loss's derivative by it, as `(G, F, L)`."""
        return z.reshape(self.groups, self.filters // self.groups, -1)

    def weight_gradient(self, x: Tensor, k: Tensor) -> Tensor:
        """`grad W = k patches(x)^T`, as `(G, F, T)`. `k`: `output_shape`."""
        patches, constant = self.patches(x), self.constant_patches(x)
        return self.rows(k) @ (patches if constant is None else patches + constant).mT

    def backward(self, k: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """`W^T k`: the loss's derivative by the layer's input. `k`: `output_shape`."""
        return self.unpatches(self.matrix(parameters[self.weight]).mT @ self.rows(k))

    def pixels(self) -> Tensor:
        """Which pixel of a channel each tap of the kernel meets at each position.

        A linear layer has one pixel and one tap per input channel (feature).

        Returns:
            Shape `(taps, L)`, int64; -1 for padding.
        """
        if self.kind == "Linear":
            return torch.zeros(1, 1, dtype=torch.int64)
        height, width = self.input_shape[1:]
        index = torch.arange(1, height * width + 1, dtype=torch.float64).reshape(1, height, width)
        channel = replace(self, input_shape=(1, height, width), groups=1)
        return channel.patches(index)[0].to(torch.int64) - 1


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """The same elements in another shape: flatten, view, reshape.

    Args:
        name: The module's path.
        input_shape: Of one example.
        output_shape: Of one example.
        kind: The step's type.
    """

    name: str
    input_shape: Shape
    output_shape: Shape
    kind: str = "Reshape"

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`x` in the output's shape."""
        return x.reshape(self.output_shape)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """A softmax over the outputs, after the last layer: part of the loss as far as the recursion is concerned.

    Args:
        name: The module's path.
        kind: The step's type.
        function: Of one example's outputs.
        input_shape: Of one example.
    """

    name: str
    kind: str
    function: Callable[[Tensor], Tensor]
    input_shape: Shape

    @property
    def output_shape(self) -> Shape:
        """The shape of the values, which is that of the arguments."""
        return self.input_shape

    def __call__(self, z: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The values at `z`, a vector."""
        return self.function(z)


@dataclass(frozen=True, kw_only=True)
class ChannelScale:
    """Batch normalisation in eval mode: `scale x + shift`, the same for all elements of a channel.

    The gradients of its weight and bias would say more about the input; the recursion does without them.

    Args:
        name: The module's path.
        kind: The module's type.
        mean: A name among the parameters and buffers, like the following ones.
        variance: Of the running variance.
        weight: `None` if there is none.
        bias: `None` if there is none.
        eps: Added to the variance.
        input_shape: Of one example.
    """

    name: str
    kind: str
    mean: str
    variance: str
    weight: str | None
    bias: str | None
    eps: float
    input_shape: Shape

    @property
    def output_shape(self) -> Shape:
        """The shape of the values, which is that of the arguments."""
        return self.input_shape

    def scale(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What each channel is multiplied by, in a shape that multiplies a value."""
        scale = (parameters[self.variance] + self.eps).rsqrt()
        return self._spread(scale if self.weight is None else scale * parameters[self.weight])

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value at `x`."""
        shift = 0.0 if self.bias is None else self._spread(parameters[self.bias])
        return (x - self._spread(parameters[self.mean])) * self.scale(parameters) + shift

    def inverse(self, y: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """`x` with the value `y`; a channel that is multiplied by zero comes back as infinite or not a number."""
        shift = 0.0 if self.bias is None else self._spread(parameters[self.bias])
        return (y - shift) / self.scale(parameters) + self._spread(parameters[self.mean])

    def backward(self, k: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The loss's derivative by the argument, from `k`, that by the value."""
        return k * self.scale(parameters)

    def _spread(self, channels: Tensor) -> Tensor:
        return channels.reshape(-1, *[1] * (len(self.input_shape) - 1))


@dataclass(frozen=True, kw_only=True)
class MeanPool:
    """Average pooling: `y = P x`, the same for each channel. It has no weight, so no gradient constraint either.

    Args:
        name: The module's path.
        kind: The module's type.
        function: The pooling of a batch.
        input_shape: Of one example.
        output_shape: Of one example.
        disjoint: Whether no two windows are known to meet (the rows of `P` are then independent).
    """

    name: str
    kind: str
    function: Callable[[Tensor], Tensor]
    input_shape: Shape
    output_shape: Shape
    disjoint: bool = False

    @property
    def unknowns(self) -> int:
        """Elements of the input."""
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return math.prod(self.output_shape)

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`P x`."""
        return self.function(x[None])[0]

    def backward(self, k: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`P^T k`."""
        return torch.func.vjp(self, k.new_zeros(self.input_shape))[1](k)[0]

    def channel(self) -> Tensor:
        """`P` of one channel: float64 `(positions, pixels)`."""
        pixels = self.unknowns // self.input_shape[0]
        pictures = torch.eye(pixels, dtype=torch.float64).reshape(pixels, 1, *self.input_shape[1:])
        return self.function(pictures).reshape(pixels, -1).mT


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """Maximum pooling. Only in a `Graph`: which element was the largest is not known to the recursion.

    Args:
        name: The module's path.
        kind: The module's type.
        function: The pooling of a batch.
        input_shape: Of one example.
        output_shape: Of one example.
    """

    name: str
    kind: str
    function: Callable[[Tensor], Tensor]
    input_shape: Shape
    output_shape: Shape

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The largest values."""
        return self.function(x[None])[0]


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The sum of two values, as in a residual block. Only in a `Graph`.

    Args:
        name: The step's.
        input_shape: Of each value, one example's.
        output_shape: Of the sum.
        kind: The step's type.
    """

    name: str
    input_shape: Shape
    output_shape: Shape
    kind: str = "Sum"


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A residual block, `branch(x) + skip(x)`. Only where a `Chain` may have some.

    Args:
        name: The block's.
        branch: Its steps.
        skip: Its steps; none is the identity.
        input_shape: Of one example.
        output_shape: Of one example.
        kind: The step's type.
    """

    name: str
    branch: tuple[Step, ...]
    skip: tuple[Step, ...]
    input_shape: Shape
    output_shape: Shape
    kind: str = "Residual"

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The sum at `x`."""
        return self.along(self.branch, x, parameters) + self.along(self.skip, x, parameters)

    @property
    def end(self) -> int:
        """Where in `branch` its last layer is, if only scales and reshapes follow it; else -1."""
        for index in reversed(range(len(self.branch))):
            if isinstance(self.branch[index], Affine):
                return index
            if not isinstance(self.branch[index], ChannelScale | Reshape):
                break
        return -1

    @staticmethod
    def along(steps: Sequence[Step], x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value of `steps` one after another."""
        for step in steps:
            x = step(x, parameters)
        return x


Step = Affine | Activation | Reshape | Rewire | Tail | ChannelScale | MeanPool | Residual
