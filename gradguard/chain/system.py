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
    `operator`: `R = 1` problem; `target`: the scaled right-hand side, shape `(1, rows)`. `scales`: what the rows of
    either kind were multiplied by, `(G, F, 1)`; those of the gradient constraints `None` if there are none.
    """

    layer: Affine
    operator: LinearOperator
    target: Tensor
    gradient_constraints: int
    scales: tuple[Tensor, Tensor | None]

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
        """`weight`, `weight_gradient` (`None`: frozen): the parameter's shape. `k`, `z`: `output_shape`.

        `known`: where `z` is, bool, `output_shape`; `None`: everywhere.
        """
        w, w_scale = _unit_rows(layer.matrix(weight))
        target = [(layer.rows(z) * w_scale).flatten()]
        seen = None if known is None else layer.rows(known).to(w.dtype)
        if seen is not None:
            target[0] = target[0] * seen.flatten()
        outputs = target[0].numel()
        if weight_gradient is None:
            kk = w.new_zeros(*w.shape[:2], layer.outputs // layer.filters)
            weights, k_scale = 0, None
        else:
            kk, k_scale = _unit_rows(layer.rows(k))
            target.append((layer.matrix(weight_gradient) * k_scale).flatten())
            weights = weight.numel()

        def matvec(v: Tensor) -> Tensor:
            patches = layer.patches(v)
            rows = w @ patches if seen is None else (w @ patches) * seen
            parts = [rows.flatten()] + ([(kk @ patches.mT).flatten()] if weights else [])
            return torch.cat(parts)[None]

        def rmatvec(u: Tensor) -> Tensor:
            rows = u[0, :outputs].view(*w.shape[:2], -1)
            columns = w.mT @ (rows if seen is None else rows * seen)
            if weights:
                columns.baddbmm_(u[0, outputs:].view(w.shape).mT, kk)
            return layer.unpatches(columns).reshape(1, -1)

        operator = LinearOperator(matvec, rmatvec, (1, outputs + weights, layer.unknowns), w)
        return cls(layer, operator, torch.cat(target)[None], weights, (w_scale, k_scale))

    def misfit(self, x: Tensor) -> Tensor:
        """`target - A x` for an input `x`, shape `(1, rows)`."""
        return self.target - self.operator.matvec(x.reshape(1, -1))

    def response(self, x: Tensor, units: Tensor, dz: Tensor, dk: Tensor) -> LinearOperator:
        """By how much the misfit at `x` falls if `t` times `dz` and `dk` is added to the outputs' `z` and `k`.

        `units`: indices `(n,)` into the flat output; `dz`, `dk`: `(n,)`. Linear in `t` `(1, n)`, at the rows' present
        scales. The unit's own weight constraint gets `dz`; the gradient constraints of its filter get `dk` times the
        patch that it sees.
        """
        patches = self.layer.patches(x)
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

        return LinearOperator(matvec, rmatvec, (1, self.target.shape[1], len(units)), patches)


def _unit_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` `(G, F, n)` with rows scaled to norm 1, and the scales `(G, F, 1)`; a zero row stays zero."""
    length = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    scale = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    return matrix * scale, scale


@contextmanager
def few_threads(layers: Sequence[Affine]) -> Iterator[None]:
    """One CPU thread while the systems of small layers are solved; the caller's number is put back.

    A solve is a thousand products of some microseconds to milliseconds each. CNN6 takes 0.3 s on one thread and 0.5 s
    on two; where other processes keep the cores busy, threads wait for each other at every product: 40 s.
    """
    small = max(layer.num_weights * (layer.outputs // layer.filters) for layer in layers) < _SMALL
    with one_thread() if small else nullcontext():
        yield
