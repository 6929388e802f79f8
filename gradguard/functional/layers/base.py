"""What a layer needs so that products go layer by layer: a weight's gradient is an outer product.

The output is linear in the weight and in the input: `z = L(W, a) + b` with `L` bilinear (a matrix product, a
convolution, a channel's scale). The gradient by `W` is `outer(a, k)` with `k = dl/dz`, and by `b` it is the sum of `k`.
Products with per-example gradients then need `a` and `k` only, and no vector with `P` elements per example:
`<outer(a, k), outer(a', k')>` is the sum of the products of two small Gram matrices ("ghost" products, Li et al. 2022,
arXiv 2110.05679, section 4).

Letters: `R` problems of one or more examples each; `N` examples of all problems together, in the problems' order; `G`
groups of channels; `I` inputs and `O` outputs of a group; `T` positions (pixels, tokens) of a problem's examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class BilinearLayer(ABC):
    """One module, called as `layer(a)` with `a = layer.operand(x, n)` instead of `module(x)`.

    `weight` and `bias` are its parameters as they are when the layer is built, `None` for one that is not there.

    Args:
        module: With its parameters, if any, as `weight` and `bias`.
        weight_name: The model's name of the weight; `None` if it is not trained.
        bias_name: The same of the bias.
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

    def operand(self, x: Tensor, examples: int) -> Tensor:
        """`a`, what the weight multiplies.

        Args:
            x: The module's input.
            examples: `N`.

        Returns:
            `(N, ...)`.
        """
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
        """`L(V_r, .)^T k` and `L(V_r, a)` for one weight per problem.

        Args:
            weights: `V`, `(R, *weight_shape)`. With `R = 1` the same weight serves all examples.
            a: The operand, `(N, ...)`.
            k: The signal, `(N, ...)`.

        Returns:
            In the shapes of `a` and of `k`.
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


def per_example(parts: Tensor, examples: int) -> Tensor:
    """One row per problem as one row per example (or one row for all, where there is one problem)."""
    return parts if len(parts) == 1 else parts.repeat_interleave(examples // len(parts), dim=0)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
