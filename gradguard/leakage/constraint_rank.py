"""The ranks of one layer's constraints on its input, exact where the matrices can be formed, else probed."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from gradguard.chain import Affine, LayerSystem, MeanPool, few_threads
from gradguard.linalg.cgls import cgls

#: Eigenvalues of a Gram matrix below this share of the largest are zero. Those of random convolutions are above 1e-9,
#: rounding is below 1e-14.
_ZERO = 1e-12
_MOST_ENTRIES = 50_000_000  # of a matrix that is formed: 400 MB
_MOST_PRODUCTS = 5_000_000_000  # of the Gram matrix of a sparse one
_MOST_ITERATIONS = 5000  # of a probe
_LEAST_ITERATIONS = 1000  # a probe that cannot have as many is not worth starting
_MOST_WORK = 1e11  # multiplications of a probe: some ten seconds


class ConstraintRank:
    """The ranks of the constraints on the input of `layer`.

    `weight`: the parameter's shape; `k`: `output_shape`, the loss's derivative by the output; both in general position,
    float64, on the CPU. `sent`: whether the weight's gradient is. `limit`: the largest side of a matrix that is formed.
    `known`: the outputs that are, bool, `output_shape`; `None`: all. `k` is zero at the others.

    The gradient constraints are the same for every input channel, `K = I (x) K_1` with `K_1` `(F taps, pixels)`, so
    `rank K` and a basis of the null space of `K` come from the small `K_1`, and
    `rank [W; K] = rank K + rank(W on the null space of K)`. Groups are alike: the first stands for all, unless some
    outputs are unknown, which each group has others of.
    """

    def __init__(
        self, layer: Affine, weight: Tensor, k: Tensor, *, sent: bool, limit: int, known: Tensor | None = None
    ) -> None:
        self.layer, self.weight, self.k, self.sent, self.limit, self.known = layer, weight, k, sent, limit, known
        self.channels = layer.input_shape[0] // layer.groups
        self.filters = layer.filters // layer.groups
        self.unknowns = layer.unknowns // layer.groups
        self.size = self.unknowns // self.channels  # pixels of a channel
        self.pixels = layer.pixels().numpy()  # (taps, L)
        self.positions = self.pixels.shape[1]

    @cached_property
    def _parts(self) -> tuple[ConstraintRank, ...]:
        """The groups as layers of their own, where they differ."""
        if self.known is None or self.layer.groups == 1:
            return ()
        input_shape = (self.channels, *self.layer.input_shape[1:])
        output_shape = (self.filters, *self.layer.output_shape[1:])
        layer = replace(self.layer, input_shape=input_shape, output_shape=output_shape, groups=1)
        parts = (t.split(self.filters) for t in (self.weight, self.k, self.known))
        return tuple(
            ConstraintRank(layer, weight, k, sent=self.sent, limit=self.limit, known=known)
            for weight, k, known in zip(*parts, strict=True)
        )

    @cached_property
    def rank_weights(self) -> int | None:
        """The rank of the weight constraints, `None` if the matrix is too large."""
        if self._parts:
            return _total([part.rank_weights for part in self._parts])
        rank: int | None = None
        # Filters are alike: in a tall matrix a part of them is enough to show full rank.
        part = -(-3 * self.unknowns // (2 * self.positions))
        if self.layer.kind == "Linear":
            known = self.filters if self.known is None else int(self.known.sum())
            rank = min(known, self.unknowns)  # a matrix of random numbers
        elif self.unknowns <= self.limit and part < self.filters and self._rank_of(part) == self.unknowns:
            rank = self.unknowns
        elif min(self.filters * self.positions, self.unknowns) <= self.limit:
            rank = self._rank_of(self.filters)
        return None if rank is None else self.layer.groups * rank

    @cached_property
    def rank_gradients(self) -> int | None:
        """The rank of the gradient constraints (0 for a frozen weight), `None` if the matrix is too large."""
        if not self.sent:
            return 0
        if self._parts:
            return _total([part.rank_gradients for part in self._parts])
        rows = self.filters * len(self.pixels)
        if min(rows, self.size) > self.limit or rows * self.size > _MOST_ENTRIES:
            return None
        return self.layer.groups * self.channels * _rank(self._gradients())

    @cached_property
    def rank(self) -> int | None:
        """The rank of both, stacked; `None` if a matrix is too large."""
        if self.layer.unknowns in (self.rank_gradients, self.rank_weights):
            return self.layer.unknowns
        if not self.sent:
            return self.rank_weights
        if self._parts:
            return _total([part.rank for part in self._parts])
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
        0 is exact, else the standard deviation is `sqrt(2 deficit / probes)`.

        Args:
            probes: Number of inputs.
            generator: Draws them.

        Returns:
            The estimate; `None` if the solver does not converge, or the layer is too large for it to be tried.
        """
        work = 8 * self.layer.num_weights * (self.layer.outputs // self.layer.filters)  # of an iteration
        iterations = min(_MOST_ITERATIONS, int(_MOST_WORK / work))
        if iterations < min(_LEAST_ITERATIONS, _MOST_ITERATIONS):
            return None
        gradient = self.weight if self.sent else None  # only the operator is used, no value of the right-hand side
        system = LayerSystem.of(self.layer, self.weight, self.k, self.k, gradient, self.known)
        missing = []
        for _ in range(probes):
            x = torch.randn(1, self.layer.unknowns, generator=generator, dtype=torch.float64)
            with few_threads([self.layer]):
                found = cgls(system.operator, system.operator.matvec(x), max_iterations=iterations)
            if not bool(found.converged.all()):
                return None
            missing.append(float((x - found.solution).square().sum()))
            if missing[0] < 1e-14 * self.layer.unknowns:
                return 0.0
        return sum(missing) / probes

    def _rank_of(self, filters: int) -> int | None:
        """The rank of `W` of the first `filters` filters, `None` if that is too much work."""
        entries = self.channels * int((self.pixels >= 0).sum()) * filters
        longer = max(filters * self.positions, self.unknowns)
        if entries**2 / longer > _MOST_PRODUCTS:
            return None
        return _rank(self._weights(filters))

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
        matrix = scipy.sparse.csr_matrix(entries, shape=(filters * self.positions, self.unknowns))
        return matrix if self.known is None else matrix[self.known.flatten()[: filters * self.positions].numpy()]

    def _gradients(self) -> np.ndarray:
        """`K_1`: row `(f, tap)` holds `k_f` at the pixels that the tap meets: `(filters * taps, pixels)`."""
        taps = len(self.pixels)
        k = self.layer.rows(self.k)[0].numpy()
        matrix = np.zeros((self.filters, taps, self.size))
        for tap in range(taps):
            inside = self.pixels[tap] >= 0
            # A tap meets a pixel at one position, and at several where padding repeats it.
            np.add.at(matrix[:, tap].T, self.pixels[tap][inside], k[:, inside].T)
        return matrix.reshape(-1, self.size)


def pool_rank(pool: MeanPool, *, limit: int) -> int | None:
    """The rank of average pooling.

    Args:
        pool: The pooling.
        limit: The largest side of a matrix that is formed.

    Returns:
        The rank; `None` if its windows meet and the matrix of one channel is too large.
    """
    if pool.disjoint:
        return pool.outputs
    channels = pool.input_shape[0]
    pixels, positions = pool.unknowns // channels, pool.outputs // channels
    if max(pixels, positions) > limit:
        return None
    return channels * _rank(pool.channel().numpy())


def _total(ranks: list[int | None]) -> int | None:
    """The sum, `None` if one is."""
    numbers = [rank for rank in ranks if rank is not None]
    return sum(numbers) if len(numbers) == len(ranks) else None


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
