"""Where R-GAP starts: the input of a linear layer, and the loss's derivative by its output, from its gradient alone.

The gradient of a linear layer has rank one, `grad W = k x^T` with `k = dl/dz`, so `k` gives `x`. With a bias `k` is
the bias's gradient. Without one, `k` and `x` are known up to a scale, which one equation of the loss fixes.
Sources: Zhu & Blaschko 2021, section 3.1 (logistic loss); the equations of softmax and of squared error are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.special import expit, lambertw
from torch import Tensor
from torch.func import jvp

Top = Callable[[Tensor, Tensor], Tensor]  # (the last layer's output (1, C), targets) -> loss

#: `-mu / (1 + e^mu)` has its minimum here, where `mu = 1 + e^-mu`; its value there.
MU_MINIMUM = 1.0 + float(lambertw(math.exp(-1.0)).real)
U_MINIMUM = float(-MU_MINIMUM * expit(-MU_MINIMUM))


@dataclass(frozen=True)
class Head:
    """A candidate for the start. `x`: the layer's input; `k`: `dl/dz` of its output, both vectors.

    `targets`: what the loss was given, where the candidate assumes it; `origin`: where it comes from, for reports.
    """

    x: Tensor
    k: Tensor
    targets: Tensor | None
    origin: str


# ---------------------------------------------------------------------- with a bias


def bias_head(weight_gradient: Tensor, bias_gradient: Tensor) -> Head:
    """`k` is the bias's gradient, whatever the loss. `weight_gradient`: `(C, n)`; `bias_gradient`: `(C,)`, not zero."""
    x = weight_gradient.mT @ bias_gradient / bias_gradient.square().sum()
    return Head(x, bias_gradient, None, "bias gradient")


# ---------------------------------------------------------------------- logistic loss


def logistic_margins(u: float) -> tuple[float, ...]:
    """Every `mu` with `-mu / (1 + e^mu) = u` (Zhu & Blaschko 2021, Eq. 6): one for `u >= 0`, else two.

    Below its minimum there is none (noise puts `u` there): the place of the minimum is then the nearest. Bracketed
    roots instead of the branches of the Lambert W function, which lose half the digits and more around the minimum.
    """
    if u <= U_MINIMUM:
        return (MU_MINIMUM,)
    if u == 0:
        return (0.0,)
    if u > 0:
        return (_margin_between(-2 * u, 0.0, u),)
    # To the right of the minimum the value is above -mu e^-mu, which is above u at 2 - 2 log|u|.
    return _margin_between(0.0, MU_MINIMUM, u), _margin_between(MU_MINIMUM, 2 - 2 * math.log(-u), u)


def _margin_between(low: float, high: float, u: float) -> float:
    return float(brentq(lambda mu: -mu * expit(-mu) - u, low, high, xtol=1e-300, rtol=1e-15, maxiter=2000))


def logistic_targets(top: Top, labels: Tensor | None, like: Tensor) -> list[tuple[Tensor, float]]:
    """Targets for which the loss is `log(1 + e^(-s z))` with `s = 1` or `-1`, and that `s`.

    Found by trying: 0, 1 and -1, or the given `labels` alone. Empty if the loss is another.
    """
    trials = [like.new_full((1, 1), y) for y in (1.0, 0.0, -1.0)] if labels is None else [labels]
    z = like.new_tensor([-2.0, -0.3, 0.4, 1.7])
    found = []
    for targets in trials:
        slope = _slopes(top, [v.reshape(1, 1) for v in z], targets)
        for sign in (1.0, -1.0):
            if slope is not None and torch.allclose(slope.flatten(), -sign * torch.sigmoid(-sign * z), atol=1e-6):
                found.append((targets, sign))
    return found


def logistic_heads(weight: Tensor, weight_gradient: Tensor, targets: list[tuple[Tensor, float]]) -> list[Head]:
    """Candidates of a layer with one output `z` and no bias: both margins `mu = s z`, for each of `targets`.

    `weight`, `weight_gradient`: `(1, n)`. `<W, grad W> = z dl/dz = -mu / (1 + e^mu)`.
    """
    u = float((weight * weight_gradient).sum())
    heads = []
    for target, sign in targets:
        for mu in logistic_margins(u):
            k = weight.new_tensor([-sign]) * torch.sigmoid(weight.new_tensor(-mu))
            heads.append(Head(weight_gradient[0] / k, k, target, f"mu = {mu:.6g}, target {target.item():g}"))
    return heads


# ---------------------------------------------------------------------- softmax cross-entropy


def is_softmax_cross_entropy(top: Top, outputs: int, label: Tensor) -> bool:
    """Whether the loss's derivative by the outputs is `softmax(z) - onehot(label)`. `label`: int64 `(1,)`."""
    z = torch.linspace(-1.0, 1.5, outputs, dtype=torch.float64, device=label.device).sin()[None]
    slope = _slopes(top, [z], label)
    if slope is None or label.is_floating_point() or label.shape != (1,):
        return False
    return torch.allclose(slope[0], torch.softmax(z, -1) - F.one_hot(label, outputs), atol=1e-6)


def softmax_heads(weight: Tensor, weight_gradient: Tensor, label: Tensor | None) -> list[Head]:
    """Candidates of a layer with `C >= 2` outputs and no bias under softmax cross-entropy.

    `weight`, `weight_gradient`: `(C, n)`; `label`: int64 `(1,)` or `None`. With `grad W = a b^T`, `|a| = 1`, the scale
    `c` in `k = c a`, `x = b / c` is fixed by `softmax(W b / c) - onehot(y) = c a`. The label's is the one entry of `k`
    below zero, `k_y = p_y - 1`, and as large as all the others together, so `c = (1 - p_y) / |a_y|` and what is left
    is one equation in `s = logit(1 - p_y)`: scanned, and every minimum polished.
    """
    a, b = rank_one(weight_gradient)
    if label is not None:
        labels = [int(label)]
    elif len(a) > 2:
        labels = [int(a.abs().argmax())]
    else:
        labels = [0, 1]
    q = weight @ b
    heads = []
    for y in labels:
        sign = -torch.sign(a[y])
        if sign == 0:
            continue
        heads += [
            Head(b / c, c * a, weight.new_full((1,), y, dtype=torch.int64), f"1 - p_y = {rest:.6g}, label {y}")
            for c, rest in _softmax_scales(sign * a, sign * q, y, sign)
        ]
    return heads


def rank_one(matrix: Tensor, sweeps: int = 30) -> tuple[Tensor, Tensor]:
    """`a` `(C,)`, of norm 1, and `b` `(n,)` with `a b^T` nearest to `matrix`: power iteration, exact at rank one."""
    a = matrix[:, matrix.square().sum(0).argmax()]
    for _ in range(sweeps):
        a = a / torch.linalg.vector_norm(a)
        a = matrix @ (matrix.mT @ a)
    a = a / torch.linalg.vector_norm(a)
    return a, matrix.mT @ a


def _softmax_scales(a: Tensor, q: Tensor, y: int, sign: Tensor) -> list[tuple[Tensor, float]]:
    """The scales `c` (signed as `b` was) with `softmax(q / c) - onehot(y) = c a`, `a_y < 0`, and `1 - p_y` at each."""
    others = torch.arange(len(a), device=a.device) != y
    a_y = -a[y]

    def mismatch(s: Tensor) -> Tensor:
        # Relative to k, whose entries are tiny in a confident model; the label's own entry says nothing new.
        c = torch.sigmoid(s)[..., None] / a_y
        p = torch.softmax(q / c, dim=-1)
        return (p[..., others] / c - a[others]) / a_y

    grid = torch.linspace(-40.0, 40.0, 1601, dtype=a.dtype, device=a.device)
    values = torch.cat([mismatch(part).square().sum(-1) for part in grid.split(200)]).nan_to_num(nan=math.inf)
    left, middle, right = values[:-2], values[1:-1], values[2:]
    minima = torch.nonzero((middle <= left) & (middle <= right)).flatten() + 1
    best = minima[values[minima].argsort()[:4]]
    roots = torch.stack([_gauss_newton(mismatch, start) for start in grid[best]])
    misses = torch.linalg.vector_norm(mismatch(roots), dim=-1)
    roots = roots[misses <= 100 * misses.min() + 1e-9]
    return [(sign * torch.sigmoid(s) / a_y, float(torch.sigmoid(s))) for s in roots]


def _gauss_newton(residual: Callable[[Tensor], Tensor], s: Tensor, steps: int = 30) -> Tensor:
    """A minimum of `|residual(s)|^2` in one variable, near `s`; steps that do not go down are halved."""

    def at(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value_and_slope: Any = jvp(residual, (s,), (torch.ones_like(s),))
        return s, *value_and_slope

    s, r, slope = at(s)
    for _ in range(steps):
        step = -(slope * r).sum() / slope.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
        trials = (at(s + step / 2**halvings) for halvings in range(30))
        better = next((trial for trial in trials if bool(trial[1].square().sum() < r.square().sum())), None)
        if better is None:
            return s
        s, r, slope = better
    return s


# ---------------------------------------------------------------------- squared error


def squared_error_targets(top: Top, outputs: int, labels: Tensor | None, like: Tensor) -> list[tuple[Tensor, float]]:
    """Targets `y` for which the loss's derivative by the outputs is `s (z - y)`, and that `s` (`nn.MSELoss`: `2 / C`).

    The given `labels` `(1, C)` alone, or each class's one-hot vector; of one output, 0, 1 and -1. Empty if the loss is
    another.
    """
    if labels is not None:
        trials = [labels] if labels.shape == (1, outputs) and labels.is_floating_point() else []
    elif outputs == 1:
        trials = [like.new_full((1, 1), y) for y in (1.0, 0.0, -1.0)]
    else:
        trials = [row[None] for row in torch.eye(outputs, dtype=like.dtype, device=like.device)]
    z = torch.linspace(-1.0, 1.5, outputs, dtype=like.dtype, device=like.device).sin()[None]
    found = []
    for targets in trials:
        points = [targets + 1.0, z, -2.0 * z]
        slope = _slopes(top, points, targets)
        if slope is not None and float(slope[0, 0]) > 0:
            s = float(slope[0, 0])
            if torch.allclose(slope, s * (torch.cat(points) - targets), atol=1e-6 * s):
                found.append((targets, s))
    return found


def squared_error_heads(weight: Tensor, weight_gradient: Tensor, targets: list[tuple[Tensor, float]]) -> list[Head]:
    """Candidates of a layer with `C` outputs and no bias under squared error, for each of `targets`.

    `weight`, `weight_gradient`: `(C, n)`. With `grad W = a b^T`, `|a| = 1`, the scale `c` in `k = c a`, `x = b / c` is
    fixed by `c a = s (W b / c - y)`: along `a` a quadratic equation in `c`, and across it the check on `y`. Candidates
    that fail the check by more than the best one does are left out.
    """
    a, b = rank_one(weight_gradient)
    q = weight @ b
    heads, misses = [], []
    for y, s in targets:
        half = float(s * (a @ y[0])) / 2
        root = max(half**2 + s * float(a @ q), 0.0) ** 0.5  # negative only by noise
        for c in dict.fromkeys((-half + root, -half - root)):
            if c != 0:
                misses.append(float(torch.linalg.vector_norm(s * (q / c - y[0]) / c - a)))
                heads.append(Head(b / c, c * a, y, f"|k| = {abs(c):.6g}, target {[round(float(v), 6) for v in y[0]]}"))
    least = min(misses, default=0.0)
    return [head for head, miss in zip(heads, misses, strict=True) if miss <= 100 * least + 1e-9]


# ---------------------------------------------------------------------- the label, once the input is known


def recover_targets(top: Top, k: Tensor) -> Tensor | None:
    """What the loss was given, from `k`, its derivative by the outputs `(C,)`; `None` for a loss that is not known.

    The signs of `k` tell the label of the binary logistic loss and of softmax cross-entropy (iDLG, Zhao et al. 2020).
    """
    if len(k) == 1:
        return next((targets for targets, sign in logistic_targets(top, None, k) if sign * float(k[0]) < 0), None)
    label = k.argmin()[None]
    return label if is_softmax_cross_entropy(top, len(k), label) else None


def _slopes(top: Top, points: list[Tensor], targets: Tensor) -> Tensor | None:
    """The loss's derivative at outputs `(1, C)`, stacked; `None` if the loss cannot take such targets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about shapes that the loss would broadcast
            outputs = torch.stack(points).requires_grad_(True)
            with torch.enable_grad():
                total = torch.stack([top(z, targets) for z in outputs]).sum()
            return torch.autograd.grad(total, outputs)[0][:, 0]
    except Exception:  # a user's loss may raise anything on targets that are not its own
        return None
