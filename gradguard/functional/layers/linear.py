"""Fully connected layers."""

from __future__ import annotations

from torch import Tensor, nn

from gradguard.functional.layers.base import BilinearLayer, MatrixLayer, per_example
from gradguard.functional.layers.registry import LayerExample, register_layer


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
        return per_example(biases, len(k)).reshape(-1, *[1] * (k.ndim - 2), biases.shape[-1])


def _examples() -> list[LayerExample]:
    return [(nn.Linear(3, 4), (3,)), (nn.Linear(5, 2, bias=False), (5,)), (nn.Linear(3, 4), (2, 3))]


@register_layer(nn.Linear, examples=_examples)
def linear(module: nn.Linear, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """`a W^T + b` at every position."""
    return LinearLayer(module, weight_name, bias_name)
