"""Elementwise functions and their inverses: what is known of an argument from its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function.

    Args:
        kind: What it is called.
        function: Its value.
        inverse_function: The argument of a value, on the rising branch; `None` if it is not one-to-one.
        interval: The open interval of its values.
        kink: The argument at which the derivative jumps, if there is one.
        turn: The argument below which the function falls again (SiLU, GELU, Mish): the inverse is that of the rising
            branch, and every value below 0 has a second argument.
        other_function: That second argument of a value.
        flat: Values that many arguments share, each with derivative zero, where every other value is its own argument:
            0 for ReLU, 0 and 6 for ReLU6.
        name: The module's path, or what the call is named in the trace.
        input_shape: Of the arguments.
    """

    kind: str
    function: Callable[[Tensor], Tensor]
    inverse_function: Callable[[Tensor], Tensor] | None = None
    interval: tuple[float, float] = (-math.inf, math.inf)
    kink: float | None = None
    turn: float | None = None
    other_function: Callable[[Tensor], Tensor] | None = None
    flat: tuple[float, ...] = ()
    name: str = ""
    input_shape: Shape = ()

    @property
    def output_shape(self) -> Shape:
        """The shape of the values, which is that of the arguments."""
        return self.input_shape

    @property
    def invertible(self) -> bool:
        """Whether the argument follows from the value."""
        return self.inverse_function is not None and self.turn is None

    @property
    def partly_invertible(self) -> bool:
        """Whether the argument follows from the value, up to two branches, or from every value not in `flat`."""
        return self.inverse_function is not None or bool(self.flat)

    def known(self, v: Tensor, margin: float) -> Tensor:
        """Where the argument follows from the value `v`: bool. What is within `margin` of a flat value counts as it."""
        found = torch.ones_like(v, dtype=torch.bool)
        for value in self.flat:
            found &= (v - value).abs() > margin
        return found & ~self.outside(v)

    def __call__(self, z: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The value at `z`, elementwise."""
        return self.function(z)

    def derivative(self, z: Tensor) -> Tensor:
        """`a'(z)`, elementwise."""
        return torch.func.grad(lambda t: self.function(t).sum())(z)

    def outside(self, v: Tensor, margin: float = 0.0) -> Tensor:
        """Where `v` is no value of the function (rounding or noise put it there).

        Args:
            v: Any shape.
            margin: How far beyond a value that is reached (ReLU's zero) still counts as that value.

        Returns:
            Bool, shaped like `v`.
        """
        low, high = self._limits(v.dtype)
        margin = margin if self.flat else 0.0
        return (v < low - margin) | (v > high + margin)

    def inverse(self, v: Tensor) -> Tensor:
        """`z` with `a(z) = v`; a `v` that is no value of the function counts as the nearest one that is."""
        if self.flat:
            return v
        assert self.inverse_function is not None, f"{self.kind} has no inverse"
        low, high = self._limits(v.dtype)
        return self.inverse_function(v.clamp(low, high))

    def other(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the argument and the derivative may be instead, and how far `z` is from where that is in doubt.

        Next to a kink the argument is the same and the derivative that of the other side; the distance is that to the
        kink. A value with a second argument is in doubt whatever `z` (distance 0), all others are not (infinite).

        Args:
            z: Arguments, any shape.

        Returns:
            Argument, derivative and distance, each shaped like `z`.
        """
        if self.kink is not None:
            return z, self.derivative(2 * self.kink - z), (z - self.kink).abs()
        if self.other_function is None:
            return z, self.derivative(z), torch.full_like(z, math.inf)
        v = self(z)
        twofold = (v < 0) & ~self.outside(v)
        other = torch.where(twofold, self.other_function(v), z)
        return other, self.derivative(other), torch.where(twofold, 0.0, math.inf).to(z)

    def _limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """The ends of the interval, moved inwards by one rounding of 1 if they are no values themselves."""
        if self.flat:
            return self.interval
        eps = torch.finfo(dtype).eps
        return self.interval[0] + eps, self.interval[1] - eps
