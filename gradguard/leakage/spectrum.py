"""The eigenvalues of `J J^T`: which changes of a picture the gradient shows, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.jacobian import InputJacobian
from gradguard.leakage.influence import fits_dense
from gradguard.linalg import largest_eigenpairs


@dataclass(frozen=True)
class Spectrum:
    """`values`: `(R, k)`, largest first; `vectors`: `(R, k, n)`, orthonormal rows in input space, in that order;
    `complete`: whether `k = n`; `residual`: `(R, k)`, an eigenvalue lies within it of each value."""

    values: Tensor
    vectors: Tensor
    complete: bool
    residual: Tensor


def spectrum(
    jacobian: InputJacobian, count: int | None = None, *, generator: torch.Generator | None = None
) -> Spectrum:
    """Eigenpairs of `J J^T` for each problem of `jacobian`.

    `count`: the leading ones by Lanczos (default 32). Where `J` is small enough to be formed, all `n` are given
    whatever `count` says, as the squares of its singular values, so that the small ones are right too.
    """
    if fits_dense(jacobian):
        # |J^T| = |R| of its QR factorisation: n x n from here on.
        r = torch.linalg.qr(jacobian.dense().mT, mode="r").R
        _, singular, vectors = torch.linalg.svd(r, full_matrices=False)
        return Spectrum(singular**2, vectors, singular.shape[-1] == jacobian.size, torch.zeros_like(singular))
    pairs = largest_eigenpairs(jacobian.gram_operator(), count or 32, tolerance=1e-4, generator=generator)
    return Spectrum(pairs.values, pairs.vectors, pairs.values.shape[-1] == jacobian.size, pairs.residual)
