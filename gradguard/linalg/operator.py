"""A batch of linear operators known only by their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearOperator:
    """`R` independent linear maps `A`, applied together.

    Args:
        matvec: `A v`: `(R, n)` to `(R, m)`.
        rmatvec: `A^T u`: `(R, m)` to `(R, n)`.
        shape: `(R, m, n)`.
        like: A tensor whose dtype and device the vectors share.
        restrict: The operator of some of the problems alone (by their indices), where there is one. A solver can then
            leave out problems that have ended.
    """

    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    like: Tensor
    restrict: Callable[[Tensor], LinearOperator] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self.like.device

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> LinearOperator:
        """The operator of `R` dense matrices.

        Args:
            matrix: Shape `(R, m, n)`.

        Returns:
            An operator that holds `matrix` itself, not a copy.
        """

        def matvec(v: Tensor) -> Tensor:
            return torch.einsum("rmn,rn->rm", matrix, v)

        def rmatvec(v: Tensor) -> Tensor:
            return torch.einsum("rmn,rm->rn", matrix, v)

        r, m, n = matrix.shape
        return cls(matvec, rmatvec, (r, m, n), matrix)


def random_unit(operator: LinearOperator, generator: torch.Generator | None = None) -> Tensor:
    """Start vectors of norm 1, uniform on the sphere, drawn on the CPU so that devices agree.

    Args:
        operator: Gives the shape, dtype and device.
        generator: Draws them; on the device of the generator if there is one.

    Returns:
        Shape `(R, n)`.
    """
    rows, _, columns = operator.shape
    device = generator.device if generator is not None else torch.device("cpu")
    v = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device=device)
    return normalise(v.to(operator.device, operator.dtype))[0]


def normalise(v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms.

    Args:
        v: Shape `(..., n)`.

    Returns:
        `v / |v|`, in the shape of `v`, and the norms `(...,)`. A zero row stays zero.
    """
    length = torch.linalg.vector_norm(v, dim=-1)
    return v * safe_inverse(length)[..., None], length


def safe_inverse(x: Tensor) -> Tensor:
    """`1 / x`, and 0 where `x` is 0 (a Krylov space that is exhausted).

    Args:
        x: Any shape.

    Returns:
        The shape of `x`.
    """
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x.abs() > tiny, 1 / torch.where(x.abs() > tiny, x, torch.ones_like(x)), torch.zeros_like(x))


def grown(basis: Tensor, limit: int) -> Tensor:
    """A basis with room for twice as many vectors.

    Args:
        basis: Shape `(R, k, n)`.
        limit: Largest number of vectors.

    Returns:
        Shape `(R, min(2 k, limit), n)`; the new rows are zero.
    """
    more = min(basis.shape[1], limit - basis.shape[1])
    return torch.cat([basis, basis.new_zeros(len(basis), more, basis.shape[2])], dim=1)


def orthogonalise(v: Tensor, basis: Tensor) -> Tensor:
    """Vectors without their components in a basis. Done twice, which is enough.

    Args:
        v: Shape `(R, n)`.
        basis: Shape `(R, k, n)`, orthonormal rows.

    Returns:
        Shape `(R, n)`.
    """
    for _ in range(2):
        v = v - torch.einsum("rk,rkn->rn", torch.einsum("rkn,rn->rk", basis, v), basis)
    return v
