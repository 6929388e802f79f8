"""Which examples of a batch are proved: what a claim must show before an attack may call a recovered input exact.

Let the first layer compute `z = W x + b` and let `k_r = dl/dz` of example `r`. Its gradient is `[grad W, grad b] =
sum_r k_r [x_r, 1]^T`. A group of units with one ratio `grad W_i / grad b_i` holds either one example, or several whose
`k_r` are proportional on these units. The second happens wherever the signal that comes back has rank one: under a
two-class softmax, a single output, a head of rank one or with equal rows, a layer of one unit; and, for examples of one
label, under a head so small that every example gets the same probabilities. Hence two certificates:

- of one example: on its units signals of different direction could be told apart (rank two or more), the head is not
  flat, and the model at the input that was found, with one label, counted once, gives just the `k` that was sent.
- of a whole batch: the gradient has as high a rank as there are examples, and the batch that was found has the gradient
  that was sent, in every layer, up to rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradguard.attacks._closed_form.rgap_problem import PERFECT
from gradguard.chain import Affine, Chain, all_parameters
from gradguard.threats.observation import Observation

#: Singular values of the signals on a group of units, relative to the largest, below which they count as zero.
_ONE_DIRECTION = 1e-2
#: Relative change of the loss's derivative between the example and no input at all below which a head is flat.
_FLAT = 1e-2
#: Relative distance of the model's `k` from the one sent. Mixtures are off by a factor, rounding of a confident example
#: in float32 by some 1e-5.
_REPRODUCED = 1e-4
#: Largest error that copies of one example may hide, relative to its size.
_COPIES_APART = 1e-4
_TRIALS = 4


@dataclass(frozen=True)
class Explained:
    """How one candidate explains its units. `label`: index into the targets tried; `mismatch`: relative distance of
    the model's `k` at the candidate from the one sent; `rank`: of the signals on these units; `change`: how much the
    loss's derivative depends on the input (0 for a flat head)."""

    label: int
    mismatch: float
    rank: int
    change: float

    @property
    def proved(self) -> bool:
        """Whether this is one example of the batch and cannot be a mixture."""
        return self.mismatch <= _REPRODUCED and self.rank >= 2 and self.change >= _FLAT


class BatchProof:
    """The certificates of an observation's first layer. `index`: where the layer is in `chain.steps`.

    `targets`: what the loss may have been given for one example, `(Y, ...)`; `None` if that is unknown, and then
    nothing can be proved.
    """

    def __init__(self, observation: Observation, chain: Chain, index: int) -> None:
        self.observation, self.chain, self.index = observation.in_dtype(torch.float64), chain, index
        self.eps = max(torch.finfo(g.dtype).eps for g in observation.sent.values())
        self.function = self.observation.loss_gradient
        self.parameters = all_parameters(self.function)
        layer = chain.steps[index]
        assert isinstance(layer, Affine)
        self.layer = layer
        self.labels = None if observation.labels is None else self.function.cast(observation.labels)
        self.targets = self._targets()

    # ------------------------------------------------------------------ of one example

    def explained(self, x: Tensor, units: Tensor, sent: Tensor) -> Explained:
        """`x`: `(n,)`, in the first layer's units; `units`: bool `(F,)`; `sent`: the bias's gradient, `(F,)`."""
        if self.targets is None:
            return Explained(0, math.inf, 0, 0.0)
        z = self._z(x)
        outputs, pull_back = self._linearised(z)
        try:
            slopes = torch.stack([self._slope(outputs, y) for y in range(len(self.targets))])
            signals = torch.stack([pull_back(t)[0] for t in slopes]).flatten(1)
            size = torch.linalg.vector_norm(sent[units])
            misses = torch.linalg.vector_norm(signals[:, units] - sent[units], dim=1) / size
            label = int(misses.nan_to_num(nan=math.inf).argmin())
            change = self._slope(self._above(self._z(torch.zeros_like(x))), label) - slopes[label]
            rank = self._signal_rank(outputs, pull_back, units)
        except Exception:  # a user's loss may raise anything on targets that are not its own
            return Explained(0, math.inf, 0, 0.0)
        flat = torch.linalg.vector_norm(change) / torch.linalg.vector_norm(slopes[label]).clamp_min(1e-300)
        return Explained(label, float(misses[label]), rank, float(flat))

    def signal_rank(self, x: Tensor, units: Tensor | None = None) -> int:
        """How many directions the signal has that comes back to the first layer's `units` (default: all) at `x`."""
        if self.targets is None:
            return 0
        z = self._z(x)
        outputs, pull_back = self._linearised(z)
        every = torch.ones(self.layer.filters, dtype=torch.bool, device=x.device)
        return self._signal_rank(outputs, pull_back, every if units is None else units)

    # ------------------------------------------------------------------ of the batch

    def rank(self, gradient: Tensor) -> int:
        """The numerical rank of the first layer's gradient `(F, n + 1)`, at the rounding it was sent with."""
        values = torch.linalg.svdvals(gradient)
        return int((values > 10 * self.eps * math.sqrt(max(gradient.shape)) * values[0]).sum())

    @property
    def rounding(self) -> float:
        """A matching loss that rounding of the sent gradient leaves."""
        return min(max(PERFECT, (1e3 * self.eps) ** 2), 1e-6)

    def copies_proved(self, inputs: Tensor, labels: Tensor | None, loss: float) -> bool:
        """Whether examples returned as copies of one another can be nothing else.

        Different examples at a relative distance `d` from their mean, whose signals are proportional, look like copies
        of the mean up to `c d^2`, `c` the relative change of the loss's derivative. So copies are proved if the
        mismatch says that `d` is small, and the signal has more than one direction.
        """
        if labels is None or self.targets is None or not loss <= self.rounding:
            return False
        rows = torch.stack([self.chain(x, self.parameters, stop=self.index).flatten() for x in inputs])
        for x, y in zip(rows, self.function.cast(labels), strict=True):
            outputs = self._above(self._z(x))
            same = (self.targets == y).reshape(len(self.targets), -1).all(1)
            label = int(same.to(torch.int64).argmax())
            slope = self._slope(outputs, label)
            change = self._slope(self._above(self._z(torch.zeros_like(x))), label) - slope
            flat = float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(slope).clamp_min(1e-300))
            if math.sqrt(loss) > _COPIES_APART**2 * min(flat, 1.0) or self.signal_rank(x) < 2:
                return False
        return True

    # ------------------------------------------------------------------ inside

    def _z(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(self.layer.input_shape), self.parameters)

    def _linearised(self, z: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        """The model's output, and what takes a derivative by it back to the first layer's output `z`."""
        found: Any = torch.func.vjp(self._above, z)
        return found[0], found[1]

    def _above(self, z: Tensor) -> Tensor:
        """The model's output from the first layer's."""
        return self.chain(z, self.parameters, start=self.index + 1)

    def _slope(self, outputs: Tensor, label: int, point: Tensor | None = None) -> Tensor:
        """The derivative of the batch's loss by one example's outputs, if that example has the target `label`.

        The other examples count as alike, with their own labels where these are known.
        """
        assert self.targets is not None
        count, target = self.observation.batch_size, self.targets[label]
        if self.labels is None:
            row, targets = 0, target.expand(count, *target.shape)
        else:
            same = (self.labels == target).reshape(count, -1).all(1)
            row, targets = int(same.to(torch.int64).argmax()), self.labels

        def loss(own: Tensor) -> Tensor:
            rows = [own if r == row else outputs for r in range(count)]
            with warnings.catch_warnings():
                # A loss that would broadcast class indices against outputs takes no classes.
                warnings.filterwarnings("error", message="Using a target size")
                return self.function.loss_fn(torch.stack(rows), targets)

        return torch.func.grad(loss)(outputs if point is None else point)

    def _signal_rank(self, outputs: Tensor, pull_back: Callable[..., Any], units: Tensor) -> int:
        """Of the signals on `units` that any outputs near these and any target could send back."""
        assert self.targets is not None
        generator = torch.Generator().manual_seed(0)
        signals = []
        for label in range(len(self.targets)):
            for trial in range(_TRIALS):
                noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
                slope = self._slope(outputs, label, outputs + trial * noise)
                size = torch.linalg.vector_norm(slope)
                if size > 0:
                    signals.append(pull_back(slope / size)[0].flatten()[units])
        if not signals:
            return 0
        values = torch.linalg.svdvals(torch.stack(signals))
        return int((values > _ONE_DIRECTION * values[0]).sum()) if float(values[0]) > 0 else 0

    def _targets(self) -> Tensor | None:
        if self.labels is not None:
            return torch.unique(self.labels, dim=0)
        outputs = self._above(
            self._z(torch.zeros(self.layer.unknowns, dtype=torch.float64, device=self.function.device))
        )
        if outputs.ndim != 1:
            return None
        if len(outputs) == 1:
            return outputs.new_tensor([[0.0], [1.0]])
        return torch.arange(self.observation.num_classes or len(outputs), device=outputs.device)
