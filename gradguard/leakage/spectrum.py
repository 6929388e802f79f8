"""The eigenvalues of `J J^T`: which changes of a picture the gradient shows, and how strongly.

A few of them (`spectrum`), or how all of them are distributed (`spectral_density`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.leakage.influence import fits_dense
from gradguard.linalg import (
    FunctionProduct,
    LinearOperator,
    extreme_eigenpairs,
    function_product,
    mean_and_error,
    random_signs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: `J J^T` is formed, where its whole spectrum is wanted, up to so many rows: `n` products and an `n x n` eigenproblem.
GRAM_SIZE = 4096
#: Products of many vectors at once hold at most so many parameter-sized elements (256 MiB in float64) ...
PARAMETER_ELEMENTS = 2**25
#: ... and Krylov bases so many elements (512 MiB in float64).
BASIS_ELEMENTS = 2**26
#: Up to so many problems a plot has a line for each; above, their median and range.
LINES = 8

Which = Literal["leading", "smallest", "both"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of `J J^T`, for `R` problems of size `n`.

    Args:
        values: Eigenvalues, shape `(R, k)`, largest first; gradient units squared per input unit squared.
        vectors: Their vectors, shape `(R, k, n)`, orthonormal rows in input space, in that order.
        complete: Whether `k = n`.
        residual: Shape `(R, k)`. An eigenvalue lies within `residual` of each value.
        index: The values' places among all `n`, shape `(k,)`; 0 is the largest.
        method: "dense": singular values of `J`; small ones are right too. "gram": `J J^T` was formed; a value below
            `residual`, the rounding of the largest, is noise. "lanczos": Ritz values; the leading ones are at most, the
            smallest ones at least the true ones.
    """

    values: Tensor
    vectors: Tensor
    complete: bool
    residual: Tensor
    index: Tensor
    method: Literal["dense", "gram", "lanczos"]

    def plot(self) -> Figure:
        """Plot the eigenvalues on a log axis by their place: a line per problem, or the median and range of many.

        Returns:
            A figure with one pair of axes.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        # A gap between the leading and the smallest ones is no line.
        breaks = torch.nonzero(self.index.diff() > 1).flatten() + 1
        pieces = list(
            zip(self.index.tensor_split(breaks.cpu()), self.values.tensor_split(breaks.cpu(), 1), strict=True)
        )
        for number, (index, values) in enumerate(pieces):
            axes.set_prop_cycle(None)
            _draw_lines(axes, index + 1, values.clamp_min(0), labelled=number == 0)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_xlabel("place of the eigenvalue")
        axes.set_ylabel("eigenvalue of $J J^T$")
        return figure


def spectrum(
    jacobian: InputJacobian,
    count: int | Literal["all"] | None = None,
    *,
    which: Which = "leading",
    method: Literal["auto", "dense", "gram", "lanczos"] = "auto",
    tolerance: float = 1e-4,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Eigenpairs of `J J^T` for each problem of `jacobian`.

    Where `J` is small enough to be formed, all `n` are given whatever `count` and `which` say, as the squares of its
    singular values. `J J^T` is formed from `n` products, up to `GRAM_SIZE` rows, for "all" and for the smallest ones,
    since Lanczos would need about as many products for those. Above that size the smallest ones are Lanczos's, and
    `residual` says how far they can be off.

    Args:
        jacobian: `R` problems with `n` input elements each.
        count: How many at each end that `which` names (default 32), or "all".
        which: Which end of the spectrum.
        method: Forces one of the three methods of `Spectrum`.
        tolerance: Of Lanczos: residuals are to be below this share of the largest eigenvalue.
        max_iterations: Of Lanczos: as in `linalg.extreme_eigenpairs`.
        generator: Draws Lanczos's first vector.

    Returns:
        The eigenpairs, largest first, and how they were computed.

    Raises:
        InputError: If an option is not one of its values, or "all" is asked for above `GRAM_SIZE` without
            `method="gram"`.
    """
    if which not in ("leading", "smallest", "both"):
        raise InputError(f'`which` must be "leading", "smallest" or "both", got {which!r}.')
    if count is not None and count != "all" and (not isinstance(count, int) or count < 1):
        raise InputError(f'`count` must be a positive number or "all", got {count!r}.')
    if method not in ("auto", "dense", "gram", "lanczos"):
        raise InputError(f'`method` must be "auto", "dense", "gram" or "lanczos", got {method!r}.')
    n = jacobian.size
    if method == "dense" or (method == "auto" and fits_dense(jacobian)):
        values, vectors = dense_eigenpairs(jacobian.dense().mT)
        return _spectrum(jacobian, values, vectors, torch.zeros_like(values), "dense", range(values.shape[-1]))
    if count == "all" and method != "gram" and n > GRAM_SIZE:
        raise InputError(
            f'`count="all"` forms J J^T, and {n} input elements are more than {GRAM_SIZE}. '
            'Ask for a number of eigenvalues or for `spectral_density`, or insist with `method="gram"`.'
        )
    each = n if count == "all" else min(count or 32, n)
    leading = each if which != "smallest" else 0
    smallest = min(each, n - leading) if which != "leading" else 0
    places = [*range(leading), *range(n - smallest, n)]
    if method == "gram" or (method == "auto" and n <= GRAM_SIZE and (count == "all" or smallest)):
        values, vectors = gram_eigenpairs(gram_matrix(jacobian))
        rounding = (n * torch.finfo(values.dtype).eps * values[:, :1]).expand(-1, len(places))
        return _spectrum(jacobian, values[:, places], vectors[:, places], rounding, "gram", places)
    pairs = extreme_eigenpairs(
        jacobian.gram_operator(),
        leading,
        smallest,
        tolerance=tolerance,
        max_iterations=max_iterations,
        generator=generator,
    )
    return _spectrum(jacobian, pairs.values, pairs.vectors, pairs.residual, "lanczos", places)


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues of `J J^T` are distributed, as `K` probes see it.

    Args:
        nodes: The nodes of each probe's quadrature, shape `(R, K, k)`.
        weights: Its weights, same shape. A weight is the number of eigenvalues near its node; a probe's weights sum to
            `n`.
        iterations: Lanczos steps `k`.
    """

    nodes: Tensor
    weights: Tensor
    iterations: int

    def count_below(self, value: float | Tensor) -> tuple[Tensor, Tensor]:
        """How many eigenvalues are below `value`.

        The standard error does not know how finely the quadrature resolves that place: it is sharp at the large end and
        coarse where many eigenvalues lie closer together than the nodes (take more `steps`).

        Args:
            value: A number, or one per problem `(R,)`.

        Returns:
            The estimated number and its standard error over the probes, both `(R,)`.
        """
        bound = torch.as_tensor(value, dtype=self.nodes.dtype, device=self.nodes.device).reshape(-1, 1, 1)
        return mean_and_error((self.weights * (self.nodes < bound)).sum(-1))

    def count_above(self, value: float | Tensor) -> tuple[Tensor, Tensor]:
        """How many eigenvalues are at or above `value`.

        Args:
            value: A number, or one per problem `(R,)`.

        Returns:
            As in `count_below`.
        """
        below, error = self.count_below(value)
        return self.weights.sum((1, 2)) / self.weights.shape[1] - below, error

    def on_grid(self, points: int = 200, *, bandwidth: float = 0.15) -> tuple[Tensor, Tensor]:
        """The density over `log10` of the eigenvalue, smoothed with Gaussians.

        What lies below the rounding of the largest eigenvalue is counted at that place.

        Args:
            points: Number of grid points.
            bandwidth: Standard deviation of the Gaussians, in decades; positive.

        Returns:
            The grid in decades, shape `(points,)`, and eigenvalues per decade, shape `(R, points)`.

        Raises:
            InputError: If `bandwidth` is not positive.
        """
        if bandwidth <= 0:
            raise InputError(f"`bandwidth` must be positive, got {bandwidth}.")
        floor = torch.finfo(self.nodes.dtype).eps * self.nodes.amax().clamp_min(torch.finfo(self.nodes.dtype).tiny)
        decades = self.nodes.clamp_min(floor).log10().flatten(1)
        weights = self.weights.flatten(1) / self.weights.shape[1]
        heavy = weights > 1e-9 * weights.amax()
        low, high = decades[heavy].amin() - 4 * bandwidth, decades[heavy].amax() + 4 * bandwidth
        grid = low + (high - low) * torch.linspace(0, 1, points, dtype=decades.dtype, device=decades.device)
        kernel = torch.exp(-0.5 * ((grid[None, :, None] - decades[:, None, :]) / bandwidth) ** 2)
        return grid, (kernel * weights[:, None]).sum(-1) / (bandwidth * (2 * torch.pi) ** 0.5)

    def plot(self, *, bandwidth: float = 0.15) -> Figure:
        """Plot the smoothed density over the eigenvalue's logarithm: a line per problem, or the median and range of
        many.

        Args:
            bandwidth: As in `on_grid`.

        Returns:
            A figure with one pair of axes.
        """
        from matplotlib.figure import Figure

        grid, density = self.on_grid(bandwidth=bandwidth)
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        _draw_lines(axes, 10**grid, density, labelled=True)
        axes.set_xscale("log")
        axes.set_xlabel("eigenvalue of $J J^T$")
        axes.set_ylabel("eigenvalues per decade")
        return figure


def spectral_density(
    jacobian: InputJacobian, *, probes: int = 8, steps: int = 40, generator: torch.Generator | None = None
) -> SpectralDensity:
    """The distribution of all eigenvalues of `J J^T` by stochastic Lanczos quadrature (see `linalg.quadrature`).

    Costs `probes * steps` products per problem. Use float64 for more than rounding of small eigenvalues.

    Args:
        jacobian: `R` problems with `n` input elements each.
        probes: Random vectors per problem, at least 2, all computed at once. The standard errors fall with their root.
        steps: Nodes per probe, at least 1.
        generator: Draws the probes.

    Returns:
        The quadratures of all probes.

    Raises:
        InputError: If `probes` or `steps` is too small.
    """
    if probes < 2 or steps < 1:
        raise InputError(f"`probes` must be at least 2 and `steps` at least 1, got {probes} and {steps}.")
    start = random_signs(jacobian.gram_operator(), probes, generator)
    found = probe(jacobian, lambda whole: whole.gram_operator(), torch.ones_like, start, steps=steps)
    return SpectralDensity(found.nodes, found.weights, found.iterations)


# ---------------------------------------------------------------------- shared with the floors


def dense_eigenpairs(transpose: Tensor, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Eigenpairs of `J J^T` from the matrix `J^T`.

    Args:
        transpose: `J^T`, shape `(R, P, n)`.
        full: Give all `n` pairs even if `P < n`; the rest of the values are 0.

    Returns:
        Values `(R, k)`, largest first, and vectors as rows `(R, k, n)`.
    """
    # |J^T| = |R| of its QR factorisation: n x n from here on.
    r = torch.linalg.qr(transpose, mode="r").R
    _, singular, vectors = torch.linalg.svd(r, full_matrices=full)
    values = singular**2
    return torch.nn.functional.pad(values, (0, vectors.shape[-2] - values.shape[-1])), vectors


def gram_eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of positive semi-definite matrices.

    Args:
        gram: Shape `(R, n, n)`, symmetric.

    Returns:
        Values `(R, n)`, largest first, none below 0, and vectors as rows `(R, n, n)`.
    """
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0), vectors.flip(-1).mT


Build = Callable[[InputJacobian], LinearOperator]


def gram_matrix(jacobian: InputJacobian, build: Build = lambda whole: whole.gram_operator()) -> Tensor:
    """`build(jacobian)`, `J J^T` or a relative of it, as matrices `(R, n, n)`, from `n` products."""
    rows, n = jacobian.num_problems, jacobian.size
    like = jacobian.inputs
    count = min(n, vectors_at_once(jacobian, 1))
    operator = build(jacobian.repeated(count))
    places = torch.arange(count * -(-n // count), device=like.device).split(count)
    # Past the last row the identity is zero, so that all groups have one size.
    groups = [(places_[:, None] == torch.arange(n, device=like.device)).to(like.dtype) for places_ in places]
    images = [operator.matvec(group.repeat(rows, 1)).reshape(rows, count, n) for group in groups]
    matrix = torch.cat(images, dim=1)[:, :n]
    return (matrix + matrix.mT) / 2


def probe(
    jacobian: InputJacobian,
    build: Build,
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    tolerance: float = 0.0,
) -> FunctionProduct:
    """`function_product` of `build(jacobian)` for `K` vectors per problem, as many at a time as fit in memory.

    Args:
        jacobian: `R` problems with `n` input elements each.
        build: Makes the operator from the Jacobian.
        function: As in `linalg.function_product`.
        start: The vectors, shape `(R, K, n)`.
        steps: As in `linalg.function_product`.
        tolerance: As in `linalg.function_product`.

    Returns:
        The products; tensors are `(R, K, ...)`, `residual` and `converged` are `(R,)`.
    """
    rows, _, n = start.shape
    parts = []
    for chunk in start.split(vectors_at_once(jacobian, steps), dim=1):
        operator = build(jacobian.repeated(chunk.shape[1]))
        check_every = 5 if tolerance > 0 else steps
        parts.append(
            function_product(
                operator, function, chunk.reshape(-1, n), steps=steps, tolerance=tolerance, check_every=check_every
            )
        )
    most = max(part.iterations for part in parts)

    def gathered(name: str) -> Tensor:
        pieces = (getattr(part, name) for part in parts)
        if name in ("nodes", "weights"):
            pieces = (torch.nn.functional.pad(piece, (0, most - piece.shape[-1])) for piece in pieces)
        return torch.cat([piece.unflatten(0, (rows, -1)) for piece in pieces], dim=1)

    return FunctionProduct(
        product=gathered("product"),
        quadratic=gathered("quadratic"),
        nodes=gathered("nodes"),
        weights=gathered("weights"),
        iterations=most,
        residual=gathered("residual").amax(1),
        converged=gathered("converged").all(1),
    )


def vectors_at_once(jacobian: InputJacobian, steps: int) -> int:
    """How many vectors per problem one product may take.

    Args:
        jacobian: `R` problems with `n` input elements each.
        steps: Vectors of the Krylov basis that is kept for each.

    Returns:
        At least 1; bounded by `PARAMETER_ELEMENTS` and `BASIS_ELEMENTS`.
    """
    rows, n = jacobian.num_problems, jacobian.size
    parameters = min(rows, jacobian.chunk_size or rows) * jacobian.gradient.num_parameters
    return max(1, min(PARAMETER_ELEMENTS // parameters, BASIS_ELEMENTS // (rows * min(steps, n) * n)))


# ---------------------------------------------------------------------- inside


def _spectrum(
    jacobian: InputJacobian,
    values: Tensor,
    vectors: Tensor,
    residual: Tensor,
    method: Literal["dense", "gram", "lanczos"],
    places: Iterable[int],
) -> Spectrum:
    index = torch.tensor(list(places), device=values.device)
    return Spectrum(values, vectors, values.shape[-1] == jacobian.size, residual, index, method)


def _draw_lines(axes: Axes, x: Tensor, rows: Tensor, *, labelled: bool) -> None:
    """A line for each of a few rows; the median and range of many."""
    x, rows = x.detach().cpu(), rows.detach().cpu()
    if len(rows) <= LINES:
        for number, row in enumerate(rows):
            axes.plot(x, row, label=f"problem {number}" if labelled else None)
    else:
        axes.fill_between(x, rows.amin(0), rows.amax(0), alpha=0.25, linewidth=0)
        label = f"median and range of {len(rows)} problems"
        axes.plot(x, rows.median(dim=0).values, label=label if labelled else None)
    if labelled and len(rows) > 1:
        axes.legend()
