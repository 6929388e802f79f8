"""The ranks of one layer's constraints on its input, exact where the matrices can be formed, else probed."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from gradguard.chain import Affine, LayerSystem, few_threads
from gradguard.linalg.cgls import cgls

#: Eigenvalues of a Gram matrix below this share of the largest are zero. Those of random convolutions are above 1e-9,
#: rounding is below 1e-14.
_ZERO = 1e-12
_MOST_ENTRIES = 50_000_000  # of a matrix that is formed: 400 MB
_MOST_ITERATIONS = 5000  # of a probe


class ConstraintRank:
    """The ranks of the constraints on the input of `layer`.

    `weight`: the parameter's shape; `k`: `output_shape`, the loss's derivative by the output; both in general position,
    float64, on the CPU. `sent`: whether the weight's gradient is. `limit`: the largest side of a matrix that is formed.

    The gradient constraints are the same for every input channel, `K = I (x) K_1` with `K_1` `(F taps, pixels)`, so
    `rank K` and a basis of the null space of `K` come from the small `K_1`, and
    `rank [W; K] = rank K + rank(W on the null space of K)`. Groups are alike: the first stands for all.
    """

    def __init__(self, layer: Affine, weight: Tensor, k: Tensor, *, sent: bool, limit: int) -> None:
        self.layer, self.weight, self.k, self.sent, self.limit = layer, weight, k, sent, limit
        self.channels = layer.input_shape[0] // layer.groups
        self.filters = layer.filters // layer.groups
        self.unknowns = layer.unknowns // layer.groups
        self.size = self.unknowns // self.channels  # pixels of a channel
        self.pixels = layer.pixels().numpy()  # (taps, L)
        self.positions = self.pixels.shape[1]

    @cached_property
    def rank_weights(self) -> int | None:
        """The rank of the weight constraints, `None` if the matrix is too large."""
        rank: int | None = None
        # Filters are alike: in a tall matrix a part of them is enough to show full rank.
        part = -(-3 * self.unknowns // (2 * self.positions))
        if self.layer.kind == "Linear":
            rank = min(self.filters, self.unknowns)  # a matrix of random numbers
        elif self.unknowns <= self.limit and part < self.filters and _rank(self._weights(part)) == self.unknowns:
            rank = self.unknowns
        elif min(self.filters * self.positions, self.unknowns) <= self.limit:
            rank = _rank(self._weights(self.filters))
        return None if rank is None else self.layer.groups * rank

    @cached_property
    def rank_gradients(self) -> int | None:
        """The rank of the gradient constraints (0 for a frozen weight), `None` if the matrix is too large."""
        if not self.sent:
            return 0
        rows = self.filters * len(self.pixels)
        if min(rows, self.size) > self.limit or rows * self.size > _MOST_ENTRIES:
            return None
        return self.layer.groups * self.channels * _rank(self._gradients())

    @cached_property
    def rank(self) -> int | None:
        """The rank of both, stacked; `None` if a matrix is too large."""
        if self.layer.unknowns in (self.rank_weights, self.rank_gradients):
            return self.layer.unknowns
        if not self.sent:
            return self.rank_weights
        if self.rank_gradients is None or self.size > self.limit:
            return None
        free = self.size - self.rank_gradients // self.layer.input_shape[0]
        columns = self.channels * free
        if columns > self.limit or columns * self.filters * self.positions > _MOST_ENTRIES:
            return None
        null = np.linalg.svd(self._gradients())[2][self.size - free :].T  # (pixels, free), orthonormal columns
        weights = self._weights(self.filters)
        blocks = [weights[:, c * self.size : (c + 1) * self.size] @ null for c in range(self.channels)]
        return self.rank_gradients + self.layer.groups * _rank(np.concatenate(blocks, axis=1))

    def probed_deficit(self, probes: int, generator: torch.Generator) -> float | None:
        """The unknowns that the constraints leave open, from random inputs solved for from their own constraints.

        The solution of least norm lacks the part in the null space, whose expected squared length is its dimension:
        0 is exact, else the standard deviation is `sqrt(2 deficit / probes)`. `None` if the solver does not converge.
        """
        gradient = self.weight if self.sent else None  # only the operator is used, no value of the right-hand side
        system = LayerSystem.of(self.layer, self.weight, self.k, self.k, gradient)
        missing = []
        for _ in range(probes):
            x = torch.randn(1, self.layer.unknowns, generator=generator, dtype=torch.float64)
            with few_threads([self.layer]):
                found = cgls(system.operator, system.operator.matvec(x), max_iterations=_MOST_ITERATIONS)
            if not bool(found.converged.all()):
                return None
            missing.append(float((x - found.solution).square().sum()))
            if missing[0] < 1e-14 * self.layer.unknowns:
                return 0.0
        return sum(missing) / probes

    def _weights(self, filters: int) -> scipy.sparse.csr_matrix:
        """`W` of the first `filters` filters of a group: `(filters * L, unknowns)`."""
        taps = len(self.pixels)
        shape = (filters, self.channels, taps, self.positions)
        weight = self.layer.matrix(self.weight)[0, :filters].reshape(filters, self.channels, taps, 1)
        values = np.broadcast_to(weight.numpy(), shape)
        rows = np.arange(filters)[:, None, None, None] * self.positions + np.arange(self.positions)
        columns = np.arange(self.channels)[None, :, None, None] * self.size + self.pixels
        inside = np.broadcast_to(self.pixels >= 0, shape)
        entries = (values[inside], (np.broadcast_to(rows, shape)[inside], np.broadcast_to(columns, shape)[inside]))
        return scipy.sparse.csr_matrix(entries, shape=(filters * self.positions, self.unknowns))

    def _gradients(self) -> np.ndarray:
        """`K_1`: row `(f, tap)` holds `k_f` at the pixels that the tap meets: `(filters * taps, pixels)`."""
        taps = len(self.pixels)
        k = self.layer.rows(self.k)[0].numpy()
        matrix = np.zeros((self.filters, taps, self.size))
        for tap in range(taps):
            inside = self.pixels[tap] >= 0  # a tap meets a pixel at one position at most
            matrix[:, tap, self.pixels[tap][inside]] = k[:, inside]
        return matrix.reshape(-1, self.size)


def _rank(matrix: np.ndarray | scipy.sparse.csr_matrix) -> int:
    """The numerical rank, through the Gram matrix of the smaller side."""
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if 0 in matrix.shape:
        return 0
    gram = matrix.T @ matrix
    gram = torch.from_numpy(gram.toarray() if scipy.sparse.issparse(gram) else gram)
    scale = gram.diagonal().max()
    if scale == 0:
        return 0
    gram = gram / scale
    # A Cholesky factorisation that succeeds below the threshold shows full rank at a tenth of the eigenvalues' cost.
    shift = _ZERO * torch.eye(len(gram), dtype=gram.dtype)
    if int(torch.linalg.cholesky_ex(gram - shift).info) == 0:
        return len(gram)
    values = torch.linalg.eigvalsh(gram)
    return int((values > _ZERO * values[-1]).sum())
