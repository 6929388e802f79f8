"""What a defense declares, as gradient matching uses it: on both sides of the distance.

The message is `mask * T(c (g + offset)) + noise`: the trial's gradient goes the same way as far as it is known, and
what says nothing is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from gradguard.attacks._matching.distances import best_scale
from gradguard.functional.vectors import Gradient, flatten
from gradguard.threats.knowledge import Knowledge, Transform
from gradguard.threats.observation import Observation

#: Noise of a tensor counts as at least this share of the noisiest one's variance: what is bare would else be all that
#: is matched.
LEAST_VARIANCE = 1e-4


class Declared:
    """The declarations of `N` pictures that are attacked together.

    `masks`: `(N, *parameter_shape)` per parameter, of the gradient's dtype, or `None`; `offsets`: likewise, or `None`.
    """

    def __init__(
        self,
        transforms: Sequence[tuple[Transform, ...]],
        scales: Sequence[float],
        masks: Gradient | None,
        offsets: Gradient | None,
        free_scale: bool,
    ) -> None:
        self.transforms, self.masks, self.offsets = list(transforms), masks, offsets
        self.scales, self.free_scale = list(scales), free_scale

    @classmethod
    def of(cls, observations: Sequence[Observation], parameters: Mapping[str, Tensor]) -> Declared | None:
        """What `observations` declare of the parameters that are matched; `None` where that changes nothing."""
        known = [o.knowledge or Knowledge() for o in observations]
        masks = None
        if any(k.mask is not None for k in known):
            masks = {n: torch.stack([_mask(k, n, p) for k in known]) for n, p in parameters.items()}
        free = any(k.scale is None for k in known)
        nonlinear = free or any(k.transforms for k in known) or any(k.scale != 1.0 for k in known)
        offsets = None
        if nonlinear and any(o.offset is not None for o in observations):
            offsets = {n: torch.stack([_offset(o, n, p) for o in observations]) for n, p in parameters.items()}
        if masks is None and not nonlinear:
            return None
        scales = [1.0 if k.scale is None else k.scale for k in known]
        return cls([k.transforms for k in known], scales, masks, offsets, free)

    @property
    def polishes(self) -> bool:
        """Whether the residual is still one of least squares in the trial's own gradient, elements left out apart."""
        return not any(self.transforms) and self.offsets is None and all(s == 1.0 for s in self.scales)

    def weights(self, pictures: Tensor) -> Tensor | None:
        """`(R, P)`, 1 for what was sent and 0 for what was not, for trials of `pictures` `(R,)`; `None`: all was."""
        if self.masks is None:
            return None
        return flatten({n: m[pictures] for n, m in self.masks.items()}, batch_dims=1)

    def pair(self, own: Gradient, sent: Gradient, pictures: Tensor, *, free_scale: bool) -> tuple[Gradient, Gradient]:
        """What to compare for trials of `pictures` `(R,)`: from the trials' gradients, and from what was sent."""
        if self.offsets is not None:
            shifts = {n: o[pictures].to(own[n]) for n, o in self.offsets.items()}
            own = {n: g + shifts[n] for n, g in own.items()}
            sent = {n: g + shifts[n] for n, g in sent.items()}
        if any(s != 1.0 for s in self.scales):
            factors = torch.tensor(self.scales, dtype=torch.float64, device=pictures.device)[pictures]
            own = {n: g * factors.to(g).reshape(-1, *[1] * (g.ndim - 1)) for n, g in own.items()}
        if any(self.transforms):
            own, sent = self._transformed(own, sent, pictures.tolist(), free_scale)
        if self.masks is not None:
            masks = {n: m[pictures].to(own[n]) for n, m in self.masks.items()}
            own = {n: g * masks[n] for n, g in own.items()}
            sent = {n: g * masks[n] for n, g in sent.items()}
        return own, sent

    def _transformed(
        self, own: Gradient, sent: Gradient, pictures: list[int], free_scale: bool
    ) -> tuple[Gradient, Gradient]:
        """The steps, trial by trial: they are functions of one gradient."""
        if free_scale:
            factor = best_scale(own, sent)
            own = {n: g * factor.reshape(-1, *[1] * (g.ndim - 1)) for n, g in own.items()}
        pairs = []
        for row, picture in enumerate(pictures):
            mine = {n: g[row] for n, g in own.items()}
            target = {n: g[row if len(g) > 1 else 0] for n, g in sent.items()}
            pairs.append(_after(self.transforms[picture], mine, target))
        one, other = ({n: torch.stack([pair[side][n] for pair in pairs]) for n in own} for side in (0, 1))
        return one, other


def matched_names(observation: Observation) -> Collection[str]:
    """The parameters that were sent and say something of the input; all that were sent, if that were none."""
    left_out = observation.knowledge.left_out if observation.knowledge is not None else ()
    return [n for n in observation.sent if n not in left_out] or list(observation.sent)


def weighed_variance(observation: Observation) -> dict[str, float | Tensor] | None:
    """The declared variance of each element, where it is not the same for all; `None` else, and behind other steps."""
    known = observation.knowledge
    if known is None or not isinstance(known.variance, Mapping) or known.transforms:
        return None
    values = {n: torch.as_tensor(known.variance.get(n, 0.0)) for n in matched_names(observation)}
    largest = max((v.max().item() for v in values.values() if v.numel()), default=0.0)
    if not largest > 0 or all(bool((v >= largest * (1 - 1e-6)).all()) for v in values.values()):
        return None
    return {n: v.double().clamp_min(LEAST_VARIANCE * largest) for n, v in values.items()}


def element_weights(observation: Observation, like: Gradient) -> Gradient:
    """`1 / std` of the declared noise on each element that is matched, 0 where nothing was sent.

    Args:
        observation: with `knowledge` that has a `variance`; another one weighs all elements 1.
        like: `(1, *parameter_shape)` for each parameter that is matched.

    Returns:
        `(*parameter_shape)` for each.
    """
    known = observation.knowledge or Knowledge()
    variance: Mapping[str, float | Tensor] | float = 1.0 if known.variance is None else known.variance
    values = {}
    for name, g in like.items():
        value = variance.get(name, 0.0) if isinstance(variance, Mapping) else variance
        values[name] = torch.as_tensor(value).to(g).expand(g.shape[1:])
    largest = max((v.max() for v in values.values() if v.numel()), default=torch.tensor(1.0))
    least = (LEAST_VARIANCE * largest).clamp_min(torch.finfo(torch.float64).tiny)
    return {n: v.clamp_min(least.to(v)).rsqrt() * _mask(known, n, v) for n, v in values.items()}


def _after(steps: tuple[Transform, ...], own: Gradient, sent: Gradient) -> tuple[Gradient, Gradient]:
    for place, step in enumerate(steps):
        nearest = getattr(step, "nearest", None)
        if nearest is not None and place == len(steps) - 1:
            return own, nearest(own, sent)
        after = step(own)
        own = {n: g + (after[n] - g).detach() for n, g in own.items()} if step.straight_through else after
    return own, sent


def _mask(known: Knowledge, name: str, like: Tensor) -> Tensor:
    mask = None if known.mask is None else known.mask.get(name)
    return torch.ones_like(like) if mask is None else mask.to(like)


def _offset(observation: Observation, name: str, like: Tensor) -> Tensor:
    offset = None if observation.offset is None else observation.offset.get(name)
    return torch.zeros_like(like) if offset is None else offset.to(like)
