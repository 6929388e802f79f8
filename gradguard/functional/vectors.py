"""Gradients as vectors: dictionaries of tensors, keyed as `named_parameters()`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Gradient = dict[str, Tensor]


def flatten(gradient: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
    """A gradient as one vector: shape `(*batch, P)`, parameters in the dictionary's order."""
    return torch.cat([g.reshape(*g.shape[:batch_dims], -1) for g in gradient.values()], dim=-1)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Gradient:
    """The inverse of `flatten`: `vector` of shape `(*batch, P)` as tensors shaped `(*batch, *parameter_shape)`."""
    sizes = [p.numel() for p in like.values()]
    pieces = vector.split(sizes, dim=-1)
    return {
        n: v.unflatten(-1, p.shape) if p.ndim else v[..., 0] for (n, p), v in zip(like.items(), pieces, strict=True)
    }


def norm(gradient: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all parameters, a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))


def add(gradient: Mapping[str, Tensor], other: Mapping[str, Tensor], scale: float | Tensor = 1.0) -> Gradient:
    """`gradient + scale * other`, name by name."""
    return {n: g + scale * other[n] for n, g in gradient.items()}
