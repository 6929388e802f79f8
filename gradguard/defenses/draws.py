"""Drawing noise: standard normal numbers by address, and the lengths that noise is scaled to."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.defenses.stream import MessageNoise, fresh_noise
from gradguard.functional.vectors import Gradient, norm


def scaled_to(delta: Gradient, length: Tensor) -> Gradient:
    """`delta` scaled to a norm; zero stays zero.

    Args:
        delta: One tensor per parameter.
        length: The norm over all of them, a scalar tensor.

    Returns:
        One tensor per parameter.
    """
    scale = length / norm(delta).clamp_min(torch.finfo(length.dtype).tiny)
    return {n: d * scale for n, d in delta.items()}


def isotropic(gradient: Tensor, noise_ratio: float, generator: torch.Generator | None, name: str) -> Tensor:
    """Independent Gaussian noise on one tensor.

    Args:
        gradient: Of any shape.
        noise_ratio: The noise's length relative to the tensor's, in expectation of the square.
        generator: Of the noise.
        name: Of the tensor, see `randn`.

    Returns:
        The noise alone, in the tensor's shape.
    """
    std = noise_ratio * torch.linalg.vector_norm(gradient) / max(gradient.numel(), 1) ** 0.5
    return std * randn(gradient.shape, gradient, generator, name)


def randn(
    shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None, name: str = ""
) -> Tensor:
    """Standard normal numbers like `like`.

    Without a generator they come from a new key; from a message's noise by the `name` of the tensor that they are for
    (see `gradguard.defenses.stream`). A seeded generator draws on its own device; a float64 gradient then gets float64
    noise, any other float32 noise, several times faster: the same generator gives different numbers to the two.

    Args:
        shape: of the noise.
        like: whose dtype and device the noise takes.
        generator: where it comes from.
        name: the address within a message; what is drawn again under one name are other numbers.

    Returns:
        Noise of shape `shape`.
    """
    if generator is None:
        generator = fresh_noise()
    if isinstance(generator, MessageNoise):
        return generator.normal(name, shape).to(like)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to(like)
