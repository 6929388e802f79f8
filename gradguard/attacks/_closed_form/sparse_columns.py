"""The sparsest basis of a column space, by exact zeros: what turns a low-rank gradient back into its examples.

`K = L Q` is `(m, b)` with many exact zeros, `L` `(m, b)` is known and `Q` is not. A column `q` of `Q` is orthogonal to
every row of `L` at which `K` has a zero, so `b - 1` such rows give it, up to its scale. Source: Dimitrov et al. 2024
(arXiv 2403.03945). Differs from the paper in: what counts as zero is measured on the gradient's own rounding
instead of fixed; the independent directions of most zeros are kept by a greedy algorithm, which for bases is exact, so
that nothing but one basis is carried from one draw to the next; and directions are completed in pairs (`completed`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: A product is zero if it is this many standard deviations of the rounding or less. Wider, and in trained models what a
#: confident example adds counts as zero in float32.
_ZERO = 6.0
#: A row this many times its rounding, or less, says nothing.
_LOST = 10.0
#: Two directions are one if the sine of the angle between their columns of `K` is below this.
_SAME = 1e-4
#: Of the directions of a guided draw, so many are completed.
_SURVIVORS = 64
#: Equal ratios that make a pair of directions worth combining: of some hundred, two are as near by chance.
_AGREE = 4


@dataclass(frozen=True)
class Factors:
    """A gradient `(m, n)` as `left @ right`, and its rounding.

    `left`: `(m, b)`; `right`: `(b, n)`, orthonormal rows; `values`: `(b,)`, the singular values; `rounding`: `(m,)`,
    the standard deviation of an entry of `left` in each row; `noise`: the first singular value left out, relative to
    the largest.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    rounding: Tensor
    noise: float

    @property
    def rank(self) -> int:
        """`b`."""
        return len(self.values)


def factors(gradient: Tensor, most: int, eps: float) -> Factors:
    """The numerical rank of `gradient` `(m, n)`, float64, at most `most`, and its factors.

    Of `B` examples the rank is at most `B`, so what the other singular values hold is rounding (or noise), and what is
    not well above it is not seen. `eps`: the relative rounding of the dtype that the gradient was sent in, below which
    nothing is believed where there are few values left to measure by.
    """
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    floor = eps / (sum(gradient.shape) ** 0.5)
    noise = max(float(s[most] / s[0]) if most < len(s) else 0.0, floor)
    rank = max(int((s[:most] > 4 * noise * s[0]).sum()), 1)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    spread = gradient.shape[1] - rank
    left = u * s
    rest = torch.linalg.vector_norm(gradient - left @ v, dim=1) / max(spread, 1) ** 0.5
    rows = torch.linalg.vector_norm(gradient, dim=1)
    # The factors' own rounding, of the size of the largest singular value, is some times the arithmetic's.
    own = 10 * torch.finfo(gradient.dtype).eps
    least = torch.maximum(floor * rows, own * s[0] / sum(gradient.shape) ** 0.5)
    return Factors(left, v, s, torch.maximum(rest, least), noise)


class SparseColumns:
    """The independent directions `q` with the most zeros in `left @ q` that were met so far.

    `basis`: `(k, b)`, `k <= b`, each with `|left @ q| = 1`, most zeros first; `zeros`: `(k,)`, how many rows.
    """

    def __init__(self, found: Factors) -> None:
        # A row that no example activates says nothing, and neither does one that is lost in rounding.
        size = torch.linalg.vector_norm(found.left, dim=1)
        self.alive = size > _LOST * found.rounding
        self.scaled = (found.left / found.rounding[:, None])[self.alive]
        self.unit = (found.left / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None])[self.alive]
        self.factors, self.values, self.rank = found, found.values, found.rank
        self.basis = found.left.new_zeros(0, found.rank)
        self.zeros = torch.zeros(0, dtype=torch.int64, device=found.left.device)

    @property
    def complete(self) -> bool:
        """Whether there are `b` independent directions."""
        return len(self.basis) == self.rank

    @property
    def open(self) -> bool:
        """Whether draws can say anything: there are several directions, and rows enough to tell one."""
        return 1 < self.rank <= len(self.unit)

    def is_zero(self, q: Tensor) -> Tensor:
        """Where `left @ q` is zero: bool `(k, rows alive)` for `q` `(k, b)`."""
        return (q @ self.scaled.mT).abs_() <= _ZERO * torch.linalg.vector_norm(q, dim=1, keepdim=True)

    def drawn(self, count: int, generator: torch.Generator | None, *, guided: bool = False) -> Tensor:
        """`count` times `b - 1` rows at random, and the direction orthogonal to each: `(count, b)`.

        `guided`: `b - 2` rows, all of them zeros of one direction of the basis. The other direction that they leave is
        a column of `Q` up to that one, which `completed` mends, and examples that are alike are inactive together.
        """
        rows, rank = self.unit.shape
        device = self.unit.device if generator is None else generator.device
        keys = torch.rand(count, rows, generator=generator, device=device).to(self.unit.device)
        if guided:
            basis = torch.arange(count, device=keys.device) % len(self.basis)
            keys += self.is_zero(self.basis)[basis]
        fixed = rank - 1 - guided
        chosen = self.unit[keys.topk(fixed, dim=1).indices]
        # Random rows make the system square.
        free = torch.randn(count, rank - fixed, rank, generator=generator, device=device, dtype=self.unit.dtype)
        system = torch.cat([chosen, free.to(self.unit.device)], dim=1)
        right = torch.zeros_like(system[:, :, :1])
        right[:, -1] = 1
        return torch.linalg.solve_ex(system, right)[0][..., 0]

    def add(self, q: Tensor) -> None:
        """Take `q` `(k, b)` in: the basis is then the sparsest one of all that was ever added.

        Greedy: the direction of most zeros that is independent of those taken before, which for bases (a matroid) gives
        the largest sum of zeros.
        """
        q = q / torch.linalg.vector_norm(q * self.values, dim=1, keepdim=True)
        zeros = self.is_zero(q).sum(1)
        keep = torch.isfinite(q).all(1) & (zeros >= (self.rank if self.rank > 1 else 0))
        q, zeros = torch.cat([self.basis, q[keep]]), torch.cat([self.zeros, zeros[keep]])
        rest = q * self.values  # as long and at the same angles as the columns of K
        taken = []
        for _ in range(min(self.rank, len(q))):
            free = torch.linalg.vector_norm(rest, dim=1) > _SAME
            best = torch.where(free, zeros, -1).argmax()
            taken.append(torch.where(free.any(), best, -1))
            along = rest[best] / torch.linalg.vector_norm(rest[best]).clamp_min(_SAME)
            rest = rest - (rest @ along)[:, None] * along
            rest[best] = 0
        order = torch.stack(taken) if taken else zeros[:0]
        order = order[order >= 0]
        self.basis, self.zeros = q[order], zeros[order]

    def sparsest(self, q: Tensor) -> Tensor:
        """The few of `q` `(k, b)` with the most zeros."""
        zeros = self.is_zero(q).sum(1) * torch.isfinite(q).all(1)
        return q[zeros.topk(min(_SURVIVORS, len(q))).indices]

    def completed(self, q: Tensor) -> Tensor:
        """`q + t basis[j]` for each `q` `(k, b)` and each `j`, `t` such that the most zeros come about: `(k b, b)`.

        Rows that are zeros of a column `q_i` have one ratio of `q_i + a q_j` to `q_j`, `a`; others have their own.
        """
        ours, theirs = q @ self.unit.mT, self.basis @ self.unit.mT
        ratio = -ours[:, None] / torch.where(self.is_zero(self.basis), torch.nan, theirs)
        ratio = torch.where(self.is_zero(q)[:, None], torch.nan, ratio).sort(dim=-1).values  # nan last
        if ratio.shape[-1] < _AGREE:
            return q[:0]
        near = (ratio[..., _AGREE - 1 :] - ratio[..., : 1 - _AGREE]) / (1 + ratio[..., : 1 - _AGREE].abs())
        place = near.nan_to_num(nan=torch.inf).argmin(-1, keepdim=True)
        t = ratio.gather(-1, place + _AGREE // 2).nan_to_num(nan=0.0)
        return (q[:, None] + t * self.basis).flatten(0, 1)

    def settle(self, sweeps: int = 10) -> None:
        """Complete the basis's own directions in pairs, and refit each to its zeros, while zeros are gained."""
        for _ in range(sweeps):
            before = int(self.zeros.sum())
            self.add(self.completed(self.basis))
            self.add(self.refitted())
            if int(self.zeros.sum()) <= before:
                break

    def refitted(self) -> Tensor:
        """Each direction of the basis as the one that comes nearest to being orthogonal to all rows of its zeros."""
        rows = self.scaled * self.is_zero(self.basis)[..., None]
        return torch.linalg.svd(rows, full_matrices=False)[2][:, -1]

    def padded(self) -> Tensor:
        """The basis `(b, b)`, what is missing filled in with directions orthogonal to it."""
        have = self.basis * self.values
        full = torch.linalg.svd(have, full_matrices=True)[2]
        return torch.cat([self.basis, full[len(have) :] / self.values])
