"""Steps that move values: each output is one input times a number plus a number, or a constant.

Normalisation by constants, padding, flips, permutations of pixels or channels, nearest-neighbour upsampling, in a
module of any class or written in a `forward`. Recognised by effect, not by class: what a function does is read off its
values, and certified on further ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.chain.activation import Shape

#: Relative distance up to which a value is what the step says, in float64.
_EXACT = 1e-11
#: The sizes of the inputs that the step is tried on: what clips or wraps values is not affine on all of them.
_SIZES = (1.0, 1e-3, 3e2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewire:
    """`y = scale x[index] + shift`, elements counted through the flattened input and output.

    `index`: int64, one entry per output, -1 for a constant; `scale`, `shift`: float64, as many. Every input has at
    least one output, so the input follows from the value.
    """

    name: str
    kind: str
    index: Tensor
    scale: Tensor
    shift: Tensor
    input_shape: Shape
    output_shape: Shape

    @property
    def one_to_one(self) -> bool:
        """Whether every output is another input."""
        return self.index.numel() == math.prod(self.input_shape) and bool((self.index >= 0).all())

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The value at `x`: `input_shape -> output_shape`."""
        y = _gathered(x.reshape(-1), self.index.to(x.device)) * self.scale.to(x) + self.shift.to(x)
        return y.reshape(self.output_shape)

    def backward(self, k: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss's derivative by the argument, from `k`, that by the value."""
        k = k.reshape(-1) * self.scale.to(k)
        return _scattered(k, self.index.to(k.device), math.prod(self.input_shape)).reshape(self.input_shape)

    def inverse(self, y: Tensor, parameters: Mapping[str, Tensor] | None = None, known: Tensor | None = None) -> Tensor:
        """`x` with the value `y`; of several copies the least-squares answer. `known`: which outputs are, bool."""
        scale = self.scale.to(y)
        weight = scale if known is None else scale * known.reshape(-1)
        n, index = math.prod(self.input_shape), self.index.to(y.device)
        above = _scattered(weight * (y.reshape(-1) - self.shift.to(y)), index, n)
        below = _scattered(weight * scale, index, n)
        return (above / torch.where(below > 0, below, 1.0)).reshape(self.input_shape)

    def known(self, known: Tensor) -> Tensor:
        """Which inputs follow from the outputs that are `known`."""
        count = _scattered(
            known.reshape(-1).to(torch.float64), self.index.to(known.device), math.prod(self.input_shape)
        )
        return (count > 0).reshape(self.input_shape)

    def after(self, first: Rewire) -> Rewire:
        """This step behind `first`, as one."""
        inside = self.index >= 0
        place = self.index.clamp_min(0)
        return Rewire(
            name=first.name,
            kind=first.kind if first.kind == self.kind else f"{first.kind}, {self.kind}",
            index=torch.where(inside, first.index[place], -1),
            scale=torch.where(inside, self.scale * first.scale[place], 0.0),
            shift=self.shift + torch.where(inside, self.scale * first.shift[place], 0.0),
            input_shape=first.input_shape,
            output_shape=self.output_shape,
        )

    def as_padding(self) -> tuple[Rewire | None, Padding] | None:
        """Apart, as an elementwise step on the input and a padding of pictures; `None` if it is something else."""
        if len(self.input_shape) != 3 or len(self.output_shape) != 3 or self.input_shape[0] != self.output_shape[0]:
            return None
        channels, n = self.input_shape[0], math.prod(self.input_shape)
        pixels = n // channels
        index = self.index.reshape(channels, -1)
        offset = torch.arange(channels)[:, None] * pixels
        local = torch.where(index >= 0, index - offset, -1)
        if not bool((local == local[0]).all()) or int(local.max()) >= pixels:
            return None
        inside = self.index >= 0
        first = torch.full((n,), -1, dtype=torch.int64)
        places = torch.arange(len(self.index))
        first[self.index[inside]] = places[inside]  # any copy
        scale, shift = self.scale[first], self.shift[first]
        alike = (scale[self.index[inside]] == self.scale[inside]) & (shift[self.index[inside]] == self.shift[inside])
        if not bool(alike.all()):
            return None
        before = None
        if bool((scale != 1).any() | (shift != 0).any()):
            shape = self.input_shape
            before = Rewire(
                name=self.name,
                kind=self.kind,
                index=torch.arange(n),
                scale=scale,
                shift=shift,
                input_shape=shape,
                output_shape=shape,
            )
        fill = torch.where(inside, 0.0, self.shift).reshape(self.output_shape)
        return before, Padding(local[0].reshape(self.output_shape[1:]), fill if bool(fill.any()) else None)


@dataclass(frozen=True, eq=False)
class Padding:
    """A picture laid out on a larger one: `index` `(H', W')` into its pixels, -1 outside.

    `fill`: `(C, H', W')`, what is outside; `None` for zeros.
    """

    index: Tensor
    fill: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """The linear part: `(C, H, W) -> (C, H', W')`, zero outside."""
        index = self.index.to(x.device)
        flat = x.reshape(x.shape[0], -1)
        return torch.where(index.flatten() >= 0, flat[:, index.flatten().clamp_min(0)], 0.0).reshape(-1, *index.shape)

    def gather(self, y: Tensor, shape: Shape) -> Tensor:
        """The transpose of `spread`: `(C, H', W') -> (C, H, W)`."""
        index = self.index.to(y.device).flatten()
        flat = y.reshape(y.shape[0], -1) * (index >= 0)
        pixels = math.prod(shape[1:])
        return flat.new_zeros(shape[0], pixels).index_add(1, index.clamp_min(0), flat).reshape(shape)


def rewired(
    function: Callable[[Tensor], Tensor], name: str, kind: str, input_shape: Shape, device: torch.device
) -> Rewire | str:
    """What `function` of a batch does, as a `Rewire`; else, why it is none, for an error message.

    `function`: in float64. It is called some times on random batches of two.

    Returns:
        The rewiring, or the reason why there is none.
    """
    generator = torch.Generator().manual_seed(0)
    n = math.prod(input_shape)

    def at(x: Tensor) -> Tensor:
        value = function(x.reshape(-1, *input_shape).to(device))
        if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(x):
            raise TypeError("it gives no batch of values")
        return value.detach().to("cpu", torch.float64)

    def drawn() -> Tensor:
        return torch.randn(2, n, generator=generator, dtype=torch.float64)

    try:
        with torch.no_grad():
            zero = at(torch.zeros(2, n, dtype=torch.float64))
            shift = zero[0].flatten()
            probe = drawn()
            first, second = (at(p[None].expand(2, -1).contiguous())[0].flatten() - shift for p in probe)
            trials = [size * drawn() for size in _SIZES]
            values = [at(x) for x in trials]
    except Exception as error:  # a user's forward may raise anything
        return f"fails on a batch of two examples of shape {input_shape} ({error})"
    alone = "does more than scale, shift, pad or move the values of one example"
    if not bool(torch.isfinite(shift).all()):
        return alone
    # Of output scale * x_j + shift the ratio at two inputs is that of their elements j.
    reach = float(probe.abs().max())
    size = max(float(first.abs().max()), float(second.abs().max()))
    inside = torch.maximum(first.abs(), second.abs()) > _EXACT * max(size, float(shift.abs().max()) * 1e-3)
    ratios, order = (probe[0] / probe[1]).sort()
    wanted = torch.where(inside, first / torch.where(second == 0, 1.0, second), 0.0)
    place = torch.searchsorted(ratios, wanted).clamp(1, max(n - 1, 1)).clamp_max(n - 1)
    nearer = (wanted - ratios[(place - 1).clamp_min(0)]).abs() < (wanted - ratios[place]).abs()
    index = torch.where(inside, order[torch.where(nearer, (place - 1).clamp_min(0), place)], -1)
    larger = torch.where(probe[0].abs() >= probe[1].abs(), 0, 1)[index.clamp_min(0)]
    value = torch.where(larger == 0, first, second)
    scale = torch.where(inside, value / torch.where(larger == 0, probe[0][index], probe[1][index]), 0.0)
    step = Rewire(
        name=name,
        kind=kind,
        index=index,
        scale=_rounded(scale, shift, reach),
        shift=shift,
        input_shape=input_shape,
        output_shape=tuple(zero.shape[1:]),
    )
    for x, y in zip(trials, values, strict=True):
        expected = torch.stack([step(row) for row in x])
        scale_of = max(float(y.abs().max()), float(expected.abs().max()))
        if not bool(((y - expected).abs() <= _EXACT * scale_of).all()):
            return alone
    if len(torch.unique(index[inside])) < n:
        return "loses part of its input"
    return step


def _rounded(scale: Tensor, shift: Tensor, reach: float) -> Tensor:
    """Factors that are 1 up to rounding as 1, and equal ones as equal: they were read off differences."""
    tolerance = 1e-12 * (1 + float(shift.abs().max()) / max(float(scale.abs().max()) * reach, 1e-300))
    scale = torch.where((scale - 1).abs() <= tolerance, 1.0, scale)
    values, places = scale.sort()
    close = torch.cat(
        [torch.zeros(1, dtype=torch.bool), (values[1:] - values[:-1]).abs() <= tolerance * values[1:].abs()]
    )
    group = (~close).cumsum(0) - 1
    starts = torch.nonzero(~close).flatten()
    return torch.empty_like(scale).scatter(0, places, values[starts[group]])


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return torch.where(index >= 0, x[index.clamp_min(0)], 0.0)


def _scattered(y: Tensor, index: Tensor, n: int) -> Tensor:
    return y.new_zeros(n).index_add(0, index.clamp_min(0), torch.where(index >= 0, y, 0.0))
