"""What natural inputs look like: covariances with fast square roots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PowerLawPrior:
    """Pictures as a Gaussian whose power falls with frequency: `C ~ 1 / (1 + f^2)` in the 2-D DCT basis.

    Natural pictures have most of their energy in low frequencies; this is the simplest covariance that says so.
    Inputs of another shape than `(..., channels, height, width)` have no known structure: they get independent
    elements.

    Args:
        channel_correlation: Correlation of the colour channels, in `[0, 1)`.
        std: The mean standard deviation of one element, in input units; positive.

    Raises:
        InputError: If a value is outside its range.
    """

    channel_correlation: float = 0.9
    std: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.channel_correlation < 1:
            raise InputError(f"`channel_correlation` must be in [0, 1), got {self.channel_correlation}.")
        if not 0 < self.std < math.inf:
            raise InputError(f"`std` must be positive and finite, got {self.std}.")

    def variances(self, height: int, width: int, like: Tensor) -> Tensor:
        """The variance of each DCT coefficient.

        Args:
            height: Pixels down.
            width: Pixels across.
            like: A tensor with the dtype and device of the result.

        Returns:
            Shape `(height, width)`, lowest frequencies first, mean `std^2`; input units squared.
        """
        rows = torch.arange(height, dtype=like.dtype, device=like.device)
        columns = torch.arange(width, dtype=like.dtype, device=like.device)
        power = 1 / (1 + rows[:, None] ** 2 + columns[None, :] ** 2)
        return self.std**2 * power / power.mean()

    def sqrt(self, x: Tensor) -> Tensor:
        """`C^{1/2} x`.

        Args:
            x: Shape `(N, channels, height, width)`, or `(N, ...)`, where `C` is `std^2 I`.

        Returns:
            The shape of `x`.
        """
        return self._root(x, 1)

    def inverse_sqrt(self, x: Tensor) -> Tensor:
        """`C^{-1/2} x`: what has unit variance in every direction if `x` was drawn from this prior.

        Args:
            x: As in `sqrt`.

        Returns:
            The shape of `x`.
        """
        return self._root(x, -1)

    def apply(self, x: Tensor) -> Tensor:
        """`C x`.

        Args:
            x: As in `sqrt`.

        Returns:
            The shape of `x`.
        """
        return self.sqrt(self.sqrt(x))

    def _root(self, x: Tensor, sign: int) -> Tensor:
        """`C^{sign / 2} x`."""
        if x.ndim != 4:
            return self.std**sign * x
        channels, height, width = x.shape[1:]
        rows, columns = dct_matrix(height, x), dct_matrix(width, x)
        x = rows @ x @ columns.mT
        x = rows.mT @ (x * self.variances(height, width, x) ** (sign / 2)) @ columns
        return torch.einsum("cd,ndhw->nchw", self._channel_root(channels, x, sign), x)

    def _channel_root(self, channels: int, like: Tensor, sign: int) -> Tensor:
        """`((1 - r) I + r 1 1^T)^{sign / 2}`, whose eigenvectors are the constant and the rest."""
        mean = torch.full((channels, channels), 1 / channels, dtype=like.dtype, device=like.device)
        rest = torch.eye(channels, dtype=like.dtype, device=like.device) - mean
        r = self.channel_correlation
        return (1 - r) ** (sign / 2) * rest + (1 - r + r * channels) ** (sign / 2) * mean


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II.

    Args:
        n: Number of samples, and of frequencies.
        like: A tensor with the dtype and device of the result.

    Returns:
        Shape `(n, n)`. Rows are frequencies, lowest first.
    """
    index = torch.arange(n, dtype=like.dtype, device=like.device)
    matrix = torch.cos(math.pi / n * (index[None, :] + 0.5) * index[:, None]) * math.sqrt(2 / n)
    matrix[0] *= math.sqrt(0.5)
    return matrix
