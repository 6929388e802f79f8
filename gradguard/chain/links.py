"""What a chain is made of: activations with their inverses, reshapes, and why anything else is refused."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.chain.activation import Activation

# ---------------------------------------------------------------------- activations, with the arguments of their calls


def leaky_relu(input: Any = None, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    """`max(z, slope z)`; one-to-one for a positive slope."""
    slope = float(negative_slope)

    def inverse(v: Tensor) -> Tensor:
        return torch.where(v > 0, v, v / slope)

    return Activation(
        kind=f"LeakyReLU({slope:g})",
        function=lambda z: F.leaky_relu(z, slope),
        inverse_function=inverse if slope > 0 else None,
        kink=0.0,
    )


def sigmoid(input: Any = None) -> Activation:
    """`1 / (1 + e^-z)`."""
    return Activation(kind="Sigmoid", function=torch.sigmoid, inverse_function=torch.logit, interval=(0.0, 1.0))


def tanh(input: Any = None) -> Activation:
    """The hyperbolic tangent."""
    return Activation(kind="Tanh", function=torch.tanh, inverse_function=torch.atanh, interval=(-1.0, 1.0))


def softplus(input: Any = None, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """`log(1 + e^(beta z)) / beta`, and `z` itself where `beta z > threshold`, as PyTorch computes it."""

    def inverse(v: Tensor) -> Tensor:
        # log(e^(beta v) - 1) / beta, written so that neither end overflows.
        return torch.where(beta * v > threshold, v, v + torch.log(-torch.expm1(-beta * v)) / beta)

    return Activation(
        kind="Softplus",
        function=lambda z: F.softplus(z, beta, threshold),
        inverse_function=inverse if beta > 0 else None,
        interval=(0.0, float("inf")),
    )


def elu(input: Any = None, alpha: float = 1.0, inplace: bool = False) -> Activation:
    """`z`, and `alpha (e^z - 1)` below zero; one-to-one for a positive `alpha`."""

    def inverse(v: Tensor) -> Tensor:
        return torch.where(v > 0, v, torch.log1p(v.clamp(max=0.0) / alpha))

    return Activation(
        kind="ELU",
        function=lambda z: F.elu(z, alpha),
        inverse_function=inverse if alpha > 0 else None,
        interval=(-alpha if alpha > 0 else -float("inf"), float("inf")),
        kink=None if alpha == 1 else 0.0,
    )


def turning(kind: str, function: Callable[[Tensor], Tensor]) -> Activation:
    """A smooth ReLU that falls to a minimum below 0 and rises from there: one-to-one on either side of it.

    Beyond its minimum it is within 0.32 of ReLU. Both inverses by bisection.

    Args:
        kind: What it is called.
        function: Its value, elementwise.

    Returns:
        The activation.
    """
    turn = bisected(
        lambda z: torch.func.grad(lambda t: function(t).sum())(z), -1.5, -0.5, torch.zeros((), dtype=torch.float64)
    )
    lowest = float(function(turn))

    def rising(v: Tensor) -> Tensor:
        low = torch.where(v > 0, v, turn.to(v))
        return bisected(lambda z: function(z) - v, low, v.clamp_min(0.0) + 0.5, v)

    def falling(v: Tensor) -> Tensor:
        return bisected(lambda z: v - function(z), -40.0, turn.to(v), v)

    return Activation(
        kind=kind,
        function=function,
        inverse_function=rising,
        other_function=falling,
        interval=(lowest, math.inf),
        turn=float(turn),
    )


def bisected(
    function: Callable[[Tensor], Tensor], low: Tensor | float, high: Tensor | float, like: Tensor, halvings: int = 60
) -> Tensor:
    """Where the rising `function` is zero between `low` and `high`, elementwise; the nearer end if it is not."""
    low, high = torch.as_tensor(low).to(like).expand_as(like), torch.as_tensor(high).to(like).expand_as(like)
    for _ in range(halvings):
        middle = (low + high) / 2
        below = function(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def silu(input: Any = None, inplace: bool = False) -> Activation:
    """`z / (1 + e^-z)`, least at -1.278."""
    return turning("SiLU", F.silu)


def mish(input: Any = None, inplace: bool = False) -> Activation:
    """`z tanh(softplus(z))`, least at -1.192."""
    return turning("Mish", F.mish)


def gelu(input: Any = None, approximate: str = "none") -> Activation:
    """`z` times the normal distribution function at `z`, least at -0.752."""
    return turning("GELU", lambda z: F.gelu(z, approximate=approximate))


def clipped(
    kind: str, function: Callable[[Tensor], Tensor], interval: tuple[float, float]
) -> Callable[..., Activation]:
    """An activation that takes no options, is `z` itself on `interval` and flat outside."""
    flat = tuple(end for end in interval if math.isfinite(end))

    def build(input: Any = None, inplace: bool = False) -> Activation:
        return Activation(kind=kind, function=function, flat=flat, interval=interval)

    return build


relu = clipped("ReLU", F.relu, (0.0, math.inf))
relu6 = clipped("ReLU6", F.relu6, (0.0, 6.0))

ACTIVATION_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.LeakyReLU: lambda m: leaky_relu(negative_slope=m.negative_slope),
    nn.Sigmoid: lambda m: sigmoid(),
    nn.Tanh: lambda m: tanh(),
    nn.Softplus: lambda m: softplus(beta=m.beta, threshold=m.threshold),
    nn.ELU: lambda m: elu(alpha=m.alpha),
    nn.ReLU: lambda m: relu(),
    nn.ReLU6: lambda m: relu6(),
    nn.SiLU: lambda m: silu(),
    nn.Mish: lambda m: mish(),
    nn.GELU: lambda m: gelu(approximate=m.approximate),
}

#: By function object, or by name for a method of a tensor; called with the call's own arguments.
ACTIVATION_CALLS: dict[Any, Callable[..., Activation]] = {
    F.leaky_relu: leaky_relu,
    **dict.fromkeys((torch.sigmoid, torch.special.expit, F.sigmoid, "sigmoid"), sigmoid),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), tanh),
    F.softplus: softplus,
    F.elu: elu,
    **dict.fromkeys((torch.relu, F.relu, "relu"), relu),
    F.relu6: relu6,
    F.silu: silu,
    F.mish: mish,
    F.gelu: gelu,
}

# ---------------------------------------------------------------------- softmax, last of all


def softmax_over_classes(function: Callable[..., Tensor]) -> Callable[..., Callable[[Tensor], Tensor]]:
    """Bind a call's `dim`; `TypeError` for any that is not the classes'."""

    def build(
        input: Any = None, dim: int | None = None, dtype: Any = None, _stacklevel: int = 3
    ) -> Callable[[Tensor], Tensor]:
        if dim not in (1, -1):
            raise TypeError(f"dim={dim}, not the classes' dimension 1")
        return partial(function, dim=-1)

    return build


TAIL_MODULES: dict[type[nn.Module], Callable[..., Callable[[Tensor], Tensor]]] = {
    nn.Softmax: softmax_over_classes(torch.softmax),
    nn.LogSoftmax: softmax_over_classes(torch.log_softmax),
}
TAIL_CALLS: dict[Any, Callable[..., Callable[[Tensor], Tensor]]] = {
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), softmax_over_classes(torch.softmax)),
    **dict.fromkeys((torch.log_softmax, F.log_softmax, "log_softmax"), softmax_over_classes(torch.log_softmax)),
}

# ---------------------------------------------------------------------- shapes

RESHAPE_CALLS = frozenset(
    {
        *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
        *("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous"),
    }
)
#: Linear in their input, each channel by itself; without weights.
MEAN_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MEAN_CALLS = frozenset({F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"})
MAX_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
MAX_CALLS = frozenset({F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d})
ADD_CALLS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})

#: Methods that give a constant in the dtype of another tensor.
LIKE_METHODS = frozenset(["to", "type_as", "new_tensor", "new_full", "new_zeros", "new_ones"])
SHAPE_METHODS = frozenset(["size", "dim", "numel"])
SHAPE_ATTRIBUTES = frozenset(["shape", "ndim", "dtype", "device"])

# ---------------------------------------------------------------------- why anything else is refused

_STATISTICS = "normalises by statistics of its input, which the recursion has no equation for. Leave it out"
_MAXIMA = "keeps one value of each window and loses the others. Use a convolution with a stride"
_MEANS = "averages over something else than windows of a picture. Use nn.AvgPool2d or a convolution with a stride"

#: Looked up along a module's classes: why it breaks the chain, and what to use instead.
REFUSED_MODULES: dict[type, str] = {
    nn.modules.batchnorm._BatchNorm: (
        "normalises by the statistics of the batch, which the recursion has no equation for. Call `model.eval()` "
        "first if that is how gradients are computed, and keep running statistics"
    ),
    nn.modules.batchnorm._NormBase: _STATISTICS,
    nn.GroupNorm: _STATISTICS,
    nn.LayerNorm: _STATISTICS,
    nn.modules.pooling._MaxPoolNd: _MAXIMA,
    nn.modules.pooling._AdaptiveMaxPoolNd: _MAXIMA,
    nn.modules.pooling._AvgPoolNd: _MEANS,
    nn.modules.pooling._AdaptiveAvgPoolNd: _MEANS,
    nn.modules.conv._ConvTransposeNd: "is a transposed convolution. Use nn.Conv2d",
    nn.modules.conv._ConvNd: "is a convolution of another kind. Use nn.Conv2d itself",
    nn.Linear: "is a subclass of Linear, which may compute anything. Use nn.Linear itself",
    nn.RNNBase: "is recurrent: it uses its weights at every time step",
    nn.MultiheadAttention: "multiplies its input with itself",
    nn.Embedding: "looks up tokens, which are no continuous input",
}

REFUSED_CALLS: dict[Any, str] = {
    **dict.fromkeys(
        ADD_CALLS,
        "adds to the value of the step before it (a residual connection?)",
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), "joins several paths"),
    **dict.fromkeys((F.linear, F.conv2d, torch.conv2d), "uses a weight outside of a layer. Use nn.Linear or nn.Conv2d"),
    **dict.fromkeys(MAX_CALLS, _MAXIMA),
    **dict.fromkeys(MEAN_CALLS, _MEANS),
    **dict.fromkeys((F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm), _STATISTICS),
}


def why_refused(module: nn.Module) -> str | None:
    """Why `module` is no link of a chain, or `None` if there is nothing particular to say."""
    return next((why for base, why in REFUSED_MODULES.items() if isinstance(module, base)), None)
