"""What a layer's output and gradient say about its input, as one linear system.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 3.2: weight constraints and gradient constraints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.chain.steps import Affine
from gradguard.linalg import LinearOperator
from gradguard.linalg.threads import one_thread

#: Multiplications in one product with a layer's weights below which more CPU threads do not pay.
_SMALL = 200_000_000


@dataclass(frozen=True)
class LayerSystem:
    """The constraints on one layer's input `x`: `W x = z` and `grad W = k (*) x`, rows scaled to norm 1.

    Both kinds of row are products of the layer's patches with a small matrix, `(G, F, T)` or `(G, F, L)`; a row of
    `W` has the norm of its filter and a row of the gradient constraints that of its filter's `k`, up to the padding.
    Without the scaling a layer with small `k` would lose the gradient constraints to rounding.
    Outputs that are not known (behind a ReLU that is zero) have zero rows.

    Args:
        layer: The layer.
        equations: All of them, an `R = 1` problem.
        values: Their scaled right-hand side, shape `(1, rows)`.
        operator: The same least-squares problem with as few rows as there are: of `F` filters at `L < F` positions the
            gradient constraints are combinations of `L` each, so an orthonormal basis of them says all that they agree
            on.
        target: Its right-hand side.
        gradient_constraints: How many of the equations are of that kind.
        scales: What the rows of either kind were multiplied by, `(G, F, 1)`; those of the gradient constraints `None`
            if there are none.
        column_lengths: The norms of the columns, `(1, unknowns)`, 1 for an empty one.
        weights: The weights with rows of norm 1, `(G, F, T)`.
        complete: Whether all outputs are known.
    """

    layer: Affine
    equations: LinearOperator
    values: Tensor
    operator: LinearOperator
    target: Tensor
    gradient_constraints: int
    scales: tuple[Tensor, Tensor | None]
    column_lengths: Tensor
    weights: Tensor
    complete: bool

    @classmethod
    def of(
        cls,
        layer: Affine,
        weight: Tensor,
        k: Tensor,
        z: Tensor,
        weight_gradient: Tensor | None,
        known: Tensor | None = None,
    ) -> LayerSystem:
        """The constraints of a layer.

        Args:
            layer: The layer.
            weight: In the parameter's shape.
            k: The loss's derivative by the output, `output_shape`.
            z: The output, `output_shape`.
            weight_gradient: In the parameter's shape; `None`: frozen.
            known: Where `z` is known, bool, `output_shape`; `None`: everywhere.

        Returns:
            The system.
        """
        w, w_scale = _unit_rows(layer.matrix(weight))
        z = layer.rows(z) * w_scale
        seen = None if known is None else layer.rows(known).to(w.dtype)
        z = (z if seen is None else z * seen).flatten()
        squares = w.square().mT @ (torch.ones_like(w[:, :, :1]) if seen is None else seen)
        if weight_gradient is None:
            operator, target = _operator(layer, w, seen, None), z[None]
            lengths = _lengths(layer, squares.expand(-1, -1, layer.outputs // layer.filters))
            return cls(layer, operator, target, operator, target, 0, (w_scale, None), lengths, w, seen is None)
        kk, k_scale = _unit_rows(layer.rows(k))
        constant = layer.constant_patches(weight)
        own = 0.0 if constant is None else layer.rows(k) @ constant.mT  # the constant padding's part of the gradient
        sent = (layer.matrix(weight_gradient) - own) * k_scale
        equations, values = _operator(layer, w, seen, kk), torch.cat([z, sent.flatten()])[None]
        operator, target = equations, values
        columns = squares + kk.square().sum(1)[:, None]
        if kk.shape[1] > kk.shape[2]:
            basis, kk = torch.linalg.qr(kk)
            operator, target = _operator(layer, w, seen, kk), torch.cat([z, (basis.mT @ sent).flatten()])[None]
        scales, lengths = (w_scale, k_scale), _lengths(layer, columns)
        return cls(layer, equations, values, operator, target, weight.numel(), scales, lengths, w, seen is None)

    def misfit(self, x: Tensor) -> Tensor:
        """What all equations leave over at an input `x`, shape `(1, rows)`."""
        return self.values - self.equations.matvec(x.reshape(1, -1))

    def response(self, x: Tensor, units: Tensor, dz: Tensor, dk: Tensor) -> LinearOperator:
        """By how much the misfit at `x` falls if `t` times `dz` and `dk` is added to the outputs' `z` and `k`.

        The unit's own weight constraint gets `dz`; the gradient constraints of its filter get `dk` times the patch that
        it sees.

        Args:
            x: The input.
            units: Indices `(n,)` into the flat output.
            dz: Shape `(n,)`.
            dk: Shape `(n,)`.

        Returns:
            An operator, linear in `t` `(1, n)`, at the rows' present scales.
        """
        patches, constant = self.layer.patches(x), self.layer.constant_patches(x)
        patches = patches if constant is None else patches + constant
        w_scale, k_scale = self.scales
        positions = self.layer.outputs // self.layer.filters
        filters = units // positions
        own = dz * w_scale.flatten()[filters]
        dk = dk if k_scale is None else dk * k_scale.flatten()[filters]
        shape = (*w_scale.shape[:2], positions)

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(self.layer.outputs).index_add(0, units, values)

        def matvec(t: Tensor) -> Tensor:
            parts = [-spread(own * t[0])]
            if k_scale is not None:
                parts.append((spread(dk * t[0]).view(shape) @ patches.mT).flatten())
            return torch.cat(parts)[None]

        def rmatvec(u: Tensor) -> Tensor:
            t = -own * u[0, : self.layer.outputs][units]
            if k_scale is not None:
                rows = u[0, self.layer.outputs :].view(*w_scale.shape[:2], -1)
                t = t + dk * (rows @ patches).flatten()[units]
            return t[None]

        return LinearOperator(matvec, rmatvec, (1, self.values.shape[1], len(units)), patches)


def _operator(layer: Affine, w: Tensor, seen: Tensor | None, kk: Tensor | None) -> LinearOperator:
    """`x` to the products of its patches with `w` `(G, F, T)`, where `seen`, and with `kk` `(G, K, L)`."""
    groups, filters, taps = w.shape
    outputs = layer.outputs
    rows = outputs + (0 if kk is None else groups * kk.shape[1] * taps)

    def matvec(v: Tensor) -> Tensor:
        patches = layer.patches(v)
        z = torch.bmm(w, patches)
        parts = [z if seen is None else z * seen]
        if kk is not None:
            parts.append(torch.bmm(kk, patches.mT))
        return torch.cat([part.flatten() for part in parts])[None]

    def rmatvec(u: Tensor) -> Tensor:
        z = u[0, :outputs].view(groups, filters, -1)
        columns = torch.bmm(w.mT, z if seen is None else z * seen)
        if kk is not None:
            columns = columns.baddbmm_(u[0, outputs:].view(groups, -1, taps).mT, kk)
        return layer.unpatches(columns).reshape(1, -1)

    return LinearOperator(matvec, rmatvec, (1, rows, layer.unknowns), w)


def _lengths(layer: Affine, squares: Tensor) -> Tensor:
    """The columns' norms `(1, n)`, from what the patches' entries `(G, T, L)` add to their squares; 1 for no entry."""
    lengths = layer.unpatches(squares).reshape(1, -1).sqrt()
    return torch.where(lengths > 0, lengths, 1.0)


def _unit_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` `(G, F, n)` with rows scaled to norm 1, and the scales `(G, F, 1)`; a zero row stays zero."""
    length = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    scale = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    return matrix * scale, scale


@contextmanager
def few_threads(layers: Sequence[Affine]) -> Iterator[None]:
    """One CPU thread while the systems of small layers are solved; the caller's number is put back.

    A solve is a thousand products of some microseconds to milliseconds each. CNN6 takes 0.15 s on one thread, and no
    less on two; where other processes keep the cores busy, threads wait for each other at every product: 40 s.

    Args:
        layers: What is solved.

    Yields:
        Nothing.
    """
    small = max(layer.num_weights * (layer.outputs // layer.filters) for layer in layers) < _SMALL
    with one_thread() if small else nullcontext():
        yield
