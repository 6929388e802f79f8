"""The space of a head's gradient, cut to its rank, and the classes that it leaves possible. See `label_system`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

#: Relative to the largest singular value: what float64 arithmetic leaves of a zero one.
ROUNDING = 1e-14
#: A linear program, a class: rank times this many at most (a second or so for each hundred classes at the limit).
LARGEST_RANK = 128


@dataclass(frozen=True, kw_only=True)
class HeadSpace:
    """The head's gradient `G = U diag(S) V^T`, cut to its rank `r`, and what its row space gives.

    `left`: `U` `(C, r)`; `strengths`: `S` `(r,)`; `right`: `V` `(m + 1, r)`, or `(m, r)` without a bias's gradient;
    `scores`: `A V` `(C, r)`; `offset`: `(C,)`, a bias whose gradient was not sent; `one`: `(r,)`, what gives the 1
    after the features, or `None`; `noise`: the largest singular value that was cut.
    """

    left: Tensor
    strengths: Tensor
    right: Tensor
    scores: Tensor
    offset: Tensor
    one: Tensor | None
    noise: Tensor

    @property
    def rank(self) -> int:
        """`r`."""
        return len(self.strengths)

    @property
    def matrix(self) -> Tensor:
        """`G`: `(C, m + 1)` or `(C, m)`."""
        return (self.left * self.strengths) @ self.right.T

    def without(self, left: Tensor, right: Tensor) -> HeadSpace:
        """Less `n` examples of `d` in coordinates `left` `(n, r)` and `e` in `right` `(n, r)`: rank `r - n`.

        `S - S x (y^T S x)^{-1} y^T S` with `S x = left^T`, `y^T S = right` (Wedderburn; Chu, Funderlic & Golub 1995).
        """
        core = torch.diag(self.strengths)
        core = core - left.T @ torch.linalg.solve((right / self.strengths) @ left.T, right)
        u, s, vt = torch.linalg.svd(core)
        kept = self.rank - len(left)
        turn = vt[:kept].T
        return replace(
            self,
            left=self.left @ u[:, :kept],
            strengths=s[:kept],
            right=self.right @ turn,
            scores=self.scores @ turn,
            one=None if self.one is None else self.one @ turn,
        )


def head_space(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_size: int,
) -> HeadSpace:
    """`weight_gradient`, `weight`: `(C, m)`; `bias_gradient`, `bias`: `(C,)` or `None`. Computes in float64.

    Singular values count as zero up to three times the first that no `B` examples can fill, where there is one, else
    up to three times what rounding in the sent dtype makes.
    """
    gradient, head = weight_gradient.detach().double(), weight.detach().double()
    offset = torch.zeros_like(head[:, 0]) if bias is None else bias.detach().double()
    if bias_gradient is not None:
        gradient = torch.cat([gradient, bias_gradient.detach().double()[:, None]], dim=1)
        head, offset = torch.cat([head, offset[:, None]], dim=1), torch.zeros_like(offset)
    # A softmax's derivatives sum to zero over the classes; what does not is rounding or noise.
    left, strengths, right = torch.linalg.svd(gradient - gradient.mean(0), full_matrices=False)
    full = min(len(gradient) - 1, gradient.shape[1])
    # The rounding of the sent numbers, unless they show it themselves.
    own = strengths[batch_size] if batch_size < full else torch.finfo(weight_gradient.dtype).eps * strengths[0]
    floor = torch.maximum(3 * own, ROUNDING * strengths[0])
    rank = int((strengths[: min(batch_size, full)] > floor).sum())
    right = right[:rank].T
    return HeadSpace(
        left=left[:, :rank],
        strengths=strengths[:rank],
        right=right,
        scores=head @ right,
        offset=offset,
        one=None if bias_gradient is None else right[-1],
        noise=floor,
    )


# ---------------------------------------------------------------------- which classes: linear programs


def class_violations(left: Tensor) -> Tensor:
    """How far the column space is from holding a `d` of each class: `(C,)`, 0 where it holds one.

    `left`: `U` `(C, r)`. For class `c` the least `t` such that some `v = U x` has `v_c = -1` and `v_j >= -t` for all
    other `j`: a class of positive `t` is absent (Dang et al. 2021). On the CPU, one linear program per class.
    """
    space = left.cpu().numpy()
    classes, rank = space.shape
    cost, zeros = np.r_[np.zeros(rank), 1.0], np.zeros(classes - 1)
    bounds = [(None, None)] * rank + [(0, None)]
    violations = np.full(classes, np.inf)
    for c in range(classes):
        others = np.c_[-np.delete(space, c, axis=0), -np.ones(classes - 1)]
        found = linprog(cost, A_ub=others, b_ub=zeros, A_eq=np.r_[space[c], 0.0][None], b_eq=[-1.0], bounds=bounds)
        if found.status == 0:
            violations[c] = found.fun
    return torch.as_tensor(violations, device=left.device)


def possible_classes(space: HeadSpace) -> Tensor:
    """The classes that the column space leaves possible: bool `(C,)`.

    The tolerance is a tenth of what noise as large as the cut singular values may do to the weakest direction kept.
    """
    if space.rank == 0:  # nothing above the noise
        return torch.zeros(len(space.left), dtype=torch.bool, device=space.left.device)
    tolerance = (0.1 * space.noise / space.strengths[-1]).clamp(1e-5, 1e-2)
    return class_violations(space.left) <= tolerance
