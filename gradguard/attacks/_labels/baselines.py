"""What label restoration is compared with: GI's minimum, RLG's linear programs, LLG's impacts. iDLG is in `labels`.

All take the head's weight gradient `(C, m)` and return counts `(C,)` int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradguard.attacks._labels.space import head_space, possible_classes
from gradguard.errors import InputError


def gi_counts(weight_gradient: Tensor, batch_size: int) -> Tensor:
    """GI (Yin et al. 2021, "See through gradients"): the `B` classes whose row has the least minimum, once each.

    Assumes non-negative features and no class twice. With `B > C` all classes: counts of sum `C`.
    """
    lowest = weight_gradient.amin(1).argsort()[:batch_size]
    return torch.zeros(len(weight_gradient), dtype=torch.int64, device=weight_gradient.device).index_fill(0, lowest, 1)


def rlg_counts(weight_gradient: Tensor, batch_size: int) -> Tensor:
    """RLG (Dang et al. 2021, "Revealing and protecting labels"): a class counts once if a hyperplane separates it.

    The column space of the gradient, rank `r`, holds a vector that is negative at the class and nowhere else: a linear
    program per class. Existence alone, so counts need not sum to `B`; with `B >= C` every class passes.
    """
    return possible_classes(head_space(weight_gradient, None, weight_gradient, None, batch_size)).long()


def llg_counts(
    weight_gradient: Tensor,
    batch_size: int,
    *,
    impact: float | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """LLG (Wainakh et al. 2022, "User-level label leakage from gradients"): impacts taken off one by one.

    With `g_c` the sum of row `c`: every class of negative `g_c` counts once and its `g_c` loses an `impact`; then the
    class of the least `g_c - s_c` counts once more, and loses an impact, until there are `B`.
    `impact`: what one example adds to `g_c`, negative; by default LLG's heuristic without a model, the mean over
    negative `g_c` times `(1 + 1/C) / B`. `offsets`: `s` `(C,)`, what absent classes have: LLG*, the bias-corrected
    form (see `llg_statistics`). Assumes non-negative features.
    """
    sums = weight_gradient.double().sum(1)
    classes = len(sums)
    if impact is None:
        impact = float(sums.clamp_max(0).sum()) * (1 + 1 / classes) / batch_size
    if not impact < 0:
        raise InputError(f"`impact` must be negative (an example lowers its class's gradient), got {impact}.")
    counts = (sums < 0).long()
    if int(counts.sum()) > batch_size:
        counts = torch.zeros_like(counts).index_fill(0, sums.argsort()[:batch_size], 1)
    sums = sums - impact * counts
    if offsets is not None:
        sums = sums - offsets
    # The greedy rule takes from the lowest each time: what is above a water line of B - n impacts, in one sort.
    left = batch_size - int(counts.sum())
    steps = torch.arange(left, device=sums.device) * -impact
    order = (sums[:, None] + steps).flatten().argsort(stable=True)[:left]
    return counts + torch.bincount(order.div(max(left, 1), rounding_mode="floor"), minlength=classes)


def llg_statistics(features: Tensor, weight: Tensor, bias: Tensor | None, batch_size: int) -> tuple[float, Tensor]:
    """LLG*'s `impact` and `offsets` `(C,)` from features `(N, m)` of auxiliary inputs, random ones in the paper.

    After Wainakh et al. 2022: one example adds `-mean_r sum(e_r) (1 + 1/C) / B` to its class, and a class has
    `mean_r p_r[c] sum(e_r)` without any.
    """
    features, weight = features.double(), weight.detach().double()
    scores = features @ weight.T + (0 if bias is None else bias.detach().double())
    sums = features.sum(1)
    impact = -float(sums.mean()) * (1 + 1 / len(weight)) / batch_size
    return impact, (scores.softmax(1) * sums[:, None]).mean(0)
