"""Tables of vectors: embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradguard.functional.layers.base import BilinearLayer
from gradguard.functional.layers.registry import LayerExample, register_layer


class EmbeddingLayer(BilinearLayer):
    """`nn.Embedding` of positions, or of tokens that are no input: `a` are indices `(N, *positions)`."""

    def operand(self, x: Tensor, examples: int) -> Tensor:
        """Indices that serve all examples, `(T,)` or `(1, T)`, once for each, so that each gets its own gradient."""
        x = x[None] if x.ndim == 1 else x
        return x.expand(examples, *x.shape[1:]) if len(x) == 1 else x

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


def _examples() -> list[LayerExample]:
    return [(nn.Embedding(5, 3), (4,))]


@register_layer(nn.Embedding, examples=_examples)
def embedding(module: nn.Embedding, weight_name: str | None, bias_name: str | None) -> BilinearLayer | None:
    """A plain table: no padding row, no renormalisation."""
    plain = module.max_norm is None and module.padding_idx is None and not module.scale_grad_by_freq
    return EmbeddingLayer(module, weight_name, None) if plain else None
