"""The other sides that the units of a layer's output may be on: across an activation's kink, or on its other branch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradguard.chain import Activation, ChannelScale, Reshape, Rewire
from gradguard.functional.vectors import Gradient

#: Units within this many times the relative error of a kink are doubtful.
_REACH = 10


@dataclass(frozen=True)
class Sides:
    """Where the units of a layer's output may be instead: `z` and `k` there, and how far each is from being in doubt.

    All in the output's shape. `distance`: in units of `z`; `scale`: the root mean square of the argument it is
    measured in.
    """

    z: Tensor
    k: Tensor
    distance: Tensor
    scale: float

    @classmethod
    def of(cls, step: Activation, z: Tensor, k: Tensor) -> Sides | None:
        """Of an activation's argument `z`; `k`: the loss's derivative by its value. `None` if nothing is in doubt."""
        if step.kink is None and step.turn is None:
            return None
        other, slope, distance = step.other(z)
        return cls(other, slope * k, distance, float(z.square().mean().sqrt()))

    def through(self, step: ChannelScale | Reshape, parameters: Gradient) -> Sides:
        """The same before `step`, a step that comes between the layer and the activation."""
        if isinstance(step, Reshape):
            z, k, distance = (v.reshape(step.input_shape) for v in (self.z, self.k, self.distance))
            return replace(self, z=z, k=k, distance=distance)
        return replace(self, z=step.inverse(self.z, parameters), k=step.backward(self.k, parameters))

    def rewired(self, step: Rewire) -> Sides:
        """The same before a one-to-one rewiring."""
        return replace(
            self,
            z=step.inverse(self.z),
            k=step.backward(self.k),
            distance=_places(step, self.distance),
        )

    def doubtful(self, error: float) -> Tensor:
        """Indices into the flat output of the units that a relative error of `error` may have put on this side."""
        return torch.nonzero((self.distance <= _REACH * error * self.scale).flatten()).flatten()

    @property
    def ambiguous(self) -> int:
        """Units whose value has two arguments."""
        return int((self.distance == 0).sum())


def _places(step: Rewire, values: Tensor) -> Tensor:
    """`values` of a one-to-one rewiring's outputs at its inputs, unscaled."""
    moved = torch.empty_like(values.flatten())
    moved[step.index.to(values.device)] = values.flatten()
    return moved.reshape(step.input_shape)
