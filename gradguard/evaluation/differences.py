"""By what a message differs from the gradient that it is said to be.

Only declared randomness protects (a factor, a mask, rounding, a regulariser or several local steps can be undone or
repeated by whoever knows of them), so every difference found here counts as known to the attacker. Finding out what it
is serves two ends: to say so, and to refuse a message that is not of this batch at these weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradguard.functional.vectors import Gradient

Look = Literal["gradient", "factor", "factors", "rounding", "weight decay", "update", "nothing", "unexplained"]

#: Below this a difference is one of arithmetic: another order of sums, TF32.
ARITHMETIC = 2e-3
#: And below this it is certainly not the rounding to half precision.
EXACT = 2e-5


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a message is, compared with a gradient.

    Args:
        looks_like: "gradient" (the same up to arithmetic), "factor" (a positive multiple), "factors" (one for each
            tensor, as clipping per tensor makes), "rounding", "weight decay", "update" (a negative multiple), "nothing"
            (only zeros, or only what the gradient does not have), "unexplained".
        factor: Of the whole message.
        factors: Of each tensor that was sent and is not unreached.
        unsent: Tensors that the message lacks or that hold only zeros, though the gradient's do not.
        unreached: Tensors that the gradient's function does not reach, but that are not zero in the message.
        masked: Among the gradient's nonzero elements in what was sent, the share that is zero in the message, in [0,
            1].
        distance: `|message - factor * gradient| / |factor * gradient|` over what was sent and is not masked, with the
            factors that `looks_like` grants.
        cosine: Of the two, before any factor, in [-1, 1].
        details: Sentences for people on everything that is no plain gradient.
    """

    looks_like: Look
    factor: float
    factors: dict[str, float]
    unsent: tuple[str, ...]
    unreached: tuple[str, ...]
    masked: float
    distance: float
    cosine: float
    details: tuple[str, ...]


def compare(
    gradient: Mapping[str, Tensor],
    message: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    unreached: Iterable[str] = (),
) -> Difference:
    """What `message` differs by from `gradient`.

    Args:
        gradient: the batch's gradient, or the mean gradient of a declared `LocalTraining`.
        message: what is about to be sent: the same names and shapes, of which some may be missing.
        parameters: the weights, to recognise weight decay.
        unreached: names that `gradient` holds zeros for because its function does not depend on them.

    Returns:
        A `Difference`. Everything is computed in float64.
    """
    beside = tuple(n for n in unreached if n in message and bool(message[n].count_nonzero()))
    left_out = set(unreached)
    moments = {n: _moments(g, message[n]) for n, g in gradient.items() if n in message and n not in left_out}
    unsent = tuple(
        n
        for n, g in gradient.items()
        if n not in left_out and (n not in moments or (moments[n].message == 0)) and bool(g.count_nonzero())
    )
    sent = {n: m for n, m in moments.items() if n not in unsent}
    total = _Moments.sum(sent.values())
    masked = total.masked / max(total.nonzero, 1)
    factor = total.product / total.gradient if total.gradient > 0 else 0.0
    distance = total.distance(factor)
    look: Look = "gradient"
    factors = dict.fromkeys(sent, factor)
    decay = None
    if not sent or (total.message == 0 and total.gradient == 0):
        look, factor, distance = ("nothing", 1.0, 0.0) if unsent or beside else ("gradient", 1.0, 0.0)
        factors = dict.fromkeys(sent, 1.0)
    elif total.cosine < -0.9:
        look = "update"
    elif EXACT < distance < 0.02 and distance <= _rounding(message, sent):
        look = "rounding"
    elif distance > ARITHMETIC:
        own = _factors_per_tensor(sent)
        decay = None if parameters is None else _decay(gradient, message, parameters, sent)
        if own is not None:
            look, factors = "factors", own
            distance = _distance(sent, own)
        elif decay is not None:
            look, factor, distance = "weight decay", decay[0], decay[2]
            factors = dict.fromkeys(sent, factor)
        else:
            look = "unexplained"
    elif abs(factor - 1) > ARITHMETIC:
        look = "factor"
    details = _details(look, factor, factors, distance, decay, message)
    return Difference(
        looks_like=look,
        factor=factor,
        factors=factors,
        unsent=unsent,
        unreached=beside,
        masked=masked,
        distance=distance,
        cosine=total.cosine,
        details=(*details, *_holes(unsent, beside, masked)),
    )


def seen_by_attacker(
    difference: Difference,
    gradient: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    *,
    amplification: float = 1.0,
    fill_unsent: bool = True,
) -> Gradient:
    """What an attacker makes of `sent` who knows by what `given` differs from `gradient`, and not what was added.

    Args:
        difference: `compare(gradient, given)`.
        gradient: the batch's true gradient.
        given: the message before a defense. The same object as `sent`: nothing was added, all is known.
        sent: the message after it.
        amplification: how much of the gradient `given` holds beside its factor (`LocalTraining.amplification`).
        fill_unsent: `True` grants the attacker the true values of what was not sent, `False` leaves those names out.

    Returns:
        `gradient + (sent - given) / factor`, name by name: only what was added hides anything. A parameter that the
        loss does not reach stays as it is in `gradient`: noise on it must not lead an attack astray.
    """
    seen = {}
    for name, true in gradient.items():
        if name in difference.factors:
            scale = difference.factors[name] * amplification
            seen[name] = true if sent is given else true + (sent[name].to(true) - given[name].to(true)) / scale
        elif fill_unsent or name not in difference.unsent:
            seen[name] = true
    return seen


# ---------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class _Moments:
    """Sums over the elements that a message holds: of the gradient's squares, the message's, and the products."""

    gradient: float
    message: float
    product: float
    masked: int
    nonzero: int
    count: int

    @classmethod
    def sum(cls, parts: Iterable[_Moments]) -> _Moments:
        rows = [(p.gradient, p.message, p.product, p.masked, p.nonzero, p.count) for p in parts]
        return cls(*(sum(column) for column in zip(*rows, strict=True))) if rows else cls(0.0, 0.0, 0.0, 0, 0, 0)

    @property
    def cosine(self) -> float:
        size = (self.gradient * self.message) ** 0.5
        return self.product / size if size > 0 else 0.0

    def squared_residual(self, factor: float) -> float:
        return max(self.message - 2 * factor * self.product + factor**2 * self.gradient, 0.0)

    def distance(self, factor: float) -> float:
        explained = abs(factor) * self.gradient**0.5
        residual = self.squared_residual(factor) ** 0.5
        if residual <= 1e-7 * self.message**0.5:
            return 0.0
        return residual / explained if explained > 0 else float("inf")


def _moments(gradient: Tensor, message: Tensor) -> _Moments:
    g, m = gradient.double(), message.to(gradient.device).double()
    holes = (m == 0) & (g != 0)
    nonzero = int((g != 0).sum())
    kept = g.masked_fill(holes, 0.0)
    # The differences of float64 sums of squares are exact to 1e-8 of the norm: far below what is asked of them.
    return _Moments(
        kept.square().sum().item(),
        m.square().sum().item(),
        (kept * m).sum().item(),
        int(holes.sum()),
        nonzero,
        g.numel(),
    )


def _distance(sent: Mapping[str, _Moments], factors: Mapping[str, float]) -> float:
    residual = sum(m.squared_residual(factors[n]) for n, m in sent.items())
    explained = sum(factors[n] ** 2 * m.gradient for n, m in sent.items())
    return (residual / explained) ** 0.5 if explained > 0 else float("inf")


def _factors_per_tensor(sent: Mapping[str, _Moments]) -> dict[str, float] | None:
    """A factor for each tensor, if that explains the message and is no mere coincidence."""
    if any(m.gradient == 0 < m.message for m in sent.values()):
        return None
    factors = {n: m.product / m.gradient if m.gradient > 0 else 1.0 for n, m in sent.items()}
    elements = sum(m.count - m.masked for m in sent.values())
    # A tensor of one number fits any factor: with few numbers to a tensor, a fit says nothing.
    believable = elements >= 8 * len(sent) and min(factors.values()) > 0
    return factors if believable and _distance(sent, factors) <= ARITHMETIC else None


def _rounding(message: Mapping[str, Tensor], sent: Iterable[str]) -> float:
    """The coarsest half precision that all numbers of the message are exact in, as its relative step; 0 if none."""
    names = list(sent)
    steps = [
        torch.finfo(dtype).eps
        for dtype in (torch.float16, torch.bfloat16)
        if all(torch.equal(message[n].to(dtype).to(message[n].dtype), message[n]) for n in names)
    ]
    return max(steps, default=0.0)


def _decay(
    gradient: Mapping[str, Tensor],
    message: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    sent: Iterable[str],
) -> tuple[float, float, float] | None:
    """`c`, `d` and the distance where the message is `c (gradient + d parameters)`."""
    names = list(sent)
    if sum(gradient[n].numel() for n in names) < 16:
        return None
    columns = torch.stack(
        [torch.cat([part[n].double().flatten() for n in names]) for part in (gradient, parameters)], dim=1
    )
    m = torch.cat([message[n].double().flatten() for n in names])
    if not columns.square().sum(0).gt(0).all():
        return None
    c, d = torch.linalg.lstsq(columns, m[:, None]).solution.flatten().tolist()
    distance = ((columns @ torch.tensor([c, d], dtype=m.dtype, device=m.device) - m).norm() / m.norm()).item()
    return (c, d / c, distance) if c > 0 < d and distance <= ARITHMETIC else None


# ---------------------------------------------------------------------- words


def _details(
    look: Look,
    factor: float,
    factors: Mapping[str, float],
    distance: float,
    decay: tuple[float, float, float] | None,
    message: Mapping[str, Tensor],
) -> tuple[str, ...]:
    """What the message is, in words."""
    if look == "update":
        return (f"it looks like an update, not a gradient: {factor:.3g} times the gradient",)
    if look == "factors":
        low, high = min(factors.values()), max(factors.values())
        return (
            f"every tensor is the true one times a factor of its own ({low:.3g} to {high:.3g}), which hides nothing",
        )
    sentences = []
    if abs(factor - 1) > ARITHMETIC and look in ("factor", "rounding", "weight decay"):
        sentences.append(f"the gradient is {factor:.3g} times the true one, which hides nothing")
    if look == "rounding":
        sentences.append(f"it is rounded to half precision, by {distance:.1g} of its norm, which hides nothing")
    if look == "weight decay" and decay is not None:
        sentences.append(
            f"it holds a weight decay of {decay[1]:.3g}, which hides nothing "
            f"(declare it: `training=LocalTraining(..., weight_decay={decay[1]:.3g})`)"
        )
    if look == "unexplained":
        sentences.append(
            f"it differs from the batch's gradient by {distance:.2g} of its norm in a way that gradguard cannot "
            "explain; what nobody declared hides nothing, so it counts as known to the attacker"
        )
    return tuple(sentences)


def _holes(unsent: tuple[str, ...], unreached: tuple[str, ...], masked: float) -> tuple[str, ...]:
    sentences = []
    if unsent:
        sentences.append(f"{listed(unsent)} {'is' if len(unsent) == 1 else 'are'} not sent or zero")
    if masked > 0:
        sentences.append(f"{masked:.0%} of the elements are set to zero, a mask that the receiver sees")
    if unreached:
        sentences.append(
            f"{listed(unreached)} {'is' if len(unreached) == 1 else 'are'} not reached by the loss measured"
        )
    return tuple(sentences)


def listed(names: tuple[str, ...], limit: int = 5) -> str:
    """Names for a sentence."""
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
