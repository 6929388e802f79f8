"""A batch's gradient around one point: every layer's operand and signal, how they move with the inputs, and back.

Computed once per point: the forward and backward pass, kept as a graph, and the graph of its transpose. Each product
with the Jacobian is then one or two linear passes; the functional way (`torch.func`) takes the forward and backward
pass again for every product, and one parameter-sized vector per example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradguard.functional.layers import LAYERS, BilinearLayer, layer_of
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.problems import Problems
from gradguard.functional.structures import map_rest, targets_of
from gradguard.functional.vectors import Gradient


@dataclass(frozen=True)
class Call:
    """One call of a layer: `a`, its operand, and `k`, the loss's derivative by its output, both `(N, ...)`."""

    layer: BilinearLayer
    a: Tensor
    k: Tensor


class NotLayered(Exception):
    """A parameter reaches the loss past every known layer: the products must go another way."""


class LayerByLayer:
    """The gradients of `R` problems of `n` examples each, at `inputs`, as functions of the inputs.

    Args:
        problems: Whose model does not mix examples, unless there is one problem only.
        with_targets: As functions of the (floating-point) targets, too.

    Raises:
        NotLayered: Some parameter is used by no known layer. Seen in the graph: known layers compute with constants, so
            a parameter that the loss depends on in autograd's eyes is used somewhere else.
    """

    def __init__(self, problems: Problems, *, with_targets: bool = False) -> None:
        self.problems = len(problems)
        self.parameters = problems.parameters
        self.shape = problems.inputs.shape
        function, rest = problems.function, problems.rest
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._x = problems.inputs.detach().flatten(0, 1).requires_grad_(True)
            soft = targets_of(rest) if with_targets else None
            if soft is not None:
                soft = rest = soft.detach().clone().requires_grad_(True)
            self._targets = soft
            leaves = {n: p.detach().requires_grad_(True) for n, p in self.parameters.items()}
            with _recorded(function, len(self._x)) as recorded:
                outputs = function.outputs(leaves, self._x, map_rest(lambda part: part.flatten(0, 1), rest))
            # Of rest, where problems are examples of a batch, the batch's own is used.
            loss = problems.loss_of_all(outputs, rest)
            used = [call for call in recorded if call[0].weight_name or call[0].bias_name]
            variables = [z for _, _, z in used]
            if not variables:
                raise NotLayered("no known layer with trained parameters")
            found = torch.autograd.grad(loss, [*variables, *leaves.values()], create_graph=True, allow_unused=True)
            stray = [n for n, g in zip(leaves, found[len(variables) :], strict=True) if g is not None]
            if stray:
                raise NotLayered(stray[0])
            signals = [torch.zeros_like(z) if k is None else k for z, k in zip(variables, found, strict=False)]
            self.calls = [Call(layer, a.detach(), k.detach()) for (layer, a, _), k in zip(used, signals, strict=True)]
            # Operands and signals in turn, those that move with the inputs.
            values = [value for (_, a, _), k in zip(used, signals, strict=True) for value in (a, k)]
            self._moving = [i for i, value in enumerate(values) if value.requires_grad]
            self._values = [values[i] for i in self._moving]
            # The transpose and its arguments. It is linear in them, so its own transpose gives the tangents.
            self._pulled: tuple[Tensor, list[Tensor]] | None = None

    # ------------------------------------------------------------------ the two linear maps

    def tangents(self, u: Tensor) -> list[tuple[Tensor, Tensor]]:
        """How operands and signals move when the inputs move by `u` `(R, n, *input_shape)`: `(da, dk)` per call."""
        if self._pulled is None:
            self._pulled = self._graph_of_pull_back([v.new_zeros(()).expand(v.shape) for v in self._values])
        pulled, arguments = self._pulled
        found: tuple[Tensor, ...] = tuple(torch.zeros_like(v) for v in self._values)
        if pulled.requires_grad:  # else nothing moves with the inputs, as behind a rounding
            found = torch.autograd.grad(
                pulled, arguments, u.reshape(self._x.shape), retain_graph=True, materialize_grads=True
            )
        moved = dict(zip(self._moving, found, strict=True))
        return [
            (
                moved[2 * i] if 2 * i in moved else torch.zeros_like(call.a),
                moved[2 * i + 1] if 2 * i + 1 in moved else torch.zeros_like(call.k),
            )
            for i, call in enumerate(self.calls)
        ]

    def pull_back(self, cotangents: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The transpose of `tangents`: `(R, n, *input_shape)`."""
        if not self._values:
            return torch.zeros_like(self._x).reshape(self.shape)
        (found,) = torch.autograd.grad(
            self._values, self._x, self._chosen(cotangents), retain_graph=True, materialize_grads=True
        )
        return found.reshape(self.shape)

    def _graph_of_pull_back(self, cotangents: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The transpose at `cotangents`, as a graph, and its arguments."""
        arguments = [c.detach().requires_grad_(True) for c in cotangents]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if not self._values:
                return torch.zeros_like(self._x), arguments
            (pulled,) = torch.autograd.grad(self._values, self._x, arguments, create_graph=True, materialize_grads=True)
        return pulled, arguments

    def _chosen(self, cotangents: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Those of the values that move."""
        both = [part for pair in cotangents for part in pair]
        return [both[i] for i in self._moving]

    # ------------------------------------------------------------------ products with the Jacobian

    def gradients(self) -> Gradient:
        """Each problem's own gradient: `(R, *parameter_shape)` per parameter."""
        found = self._sum({}, [(call.layer.outer(call.a, call.k, self.problems), call.k) for call in self.calls])
        # A parameter that the loss does not reach (a lookup that is bypassed): zeros that take no memory.
        return {
            n: found[n] if n in found else p.new_zeros(()).expand(self.problems, *p.shape)
            for n, p in self.parameters.items()
        }

    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_r^T u_r`: `(R, *parameter_shape)` per parameter."""
        moved = zip(self.calls, self.tangents(u), strict=True)
        parts = [(call.layer.change(call.a, call.k, da, dk, self.problems), dk) for call, (da, dk) in moved]
        return self._sum({n: p.new_zeros(self.problems, *p.shape) for n, p in self.parameters.items()}, parts)

    def matvec(self, delta: Mapping[str, Tensor], *, then: bool = False) -> Tensor:
        """`J_r delta_r`.

        Args:
            delta: One row for each problem, or one for all: `(R, *parameter_shape)` or `(1, *parameter_shape)`.
            then: Other products follow, whose graph is made on the way.

        Returns:
            `(R, n, *input_shape)`.
        """
        if then and self._pulled is None:
            self._pulled = self._graph_of_pull_back(self._chosen(self._cotangents(delta)))
            return self._pulled[0].detach().reshape(self.shape)
        return self.pull_back(self._cotangents(delta))

    def matvec_with_targets(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same, and the derivative of `<delta_r, gradient_r>` by the targets, shaped as they (`None` if fixed)."""
        if self._targets is None:
            return self.matvec(delta), None
        by_inputs, by_targets = torch.autograd.grad(
            self._values,
            [self._x, self._targets],
            self._chosen(self._cotangents(delta)),
            retain_graph=True,
            materialize_grads=True,
        )
        return by_inputs.reshape(self.shape), by_targets

    def _cotangents(self, delta: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Derivatives of `<delta_r, gradient_r>` by every call's operand and signal."""
        cotangents = []
        for call in self.calls:
            layer = call.layer
            to_a, to_k = torch.zeros_like(call.a), torch.zeros_like(call.k)
            if layer.weight_name is not None:
                to_a, to_k = layer.apply(delta[layer.weight_name], call.a, call.k)
            if layer.bias_name is not None:
                to_k = to_k + layer.spread_bias(delta[layer.bias_name], call.k)
            cotangents.append((to_a, to_k))
        return cotangents

    def gram(self, u: Tensor) -> Tensor:
        """`J_r J_r^T u_r`: `(R, n, *input_shape)`, with no parameter-sized vector where a layer has a shorter way."""
        if self._shares_parameters:
            return self.matvec(self.rmatvec(u))
        tangents = self.tangents(u)
        cotangents = []
        for call in self.calls:
            layer, (da, dk) = call.layer, tangents.pop(0)
            to_a, to_k = torch.zeros_like(call.a), torch.zeros_like(call.k)
            if layer.weight_name is not None:
                to_a, to_k = layer.gram(call.a, call.k, da, dk, self.problems)
            if layer.bias_name is not None:
                to_k = to_k + layer.spread_bias(layer.sum_bias(dk, self.problems), call.k)
            cotangents.append((to_a, to_k))
        return self.pull_back(cotangents)

    @property
    def _shares_parameters(self) -> bool:
        """Whether some parameter is used by more than one call."""
        names = [n for call in self.calls for n in (call.layer.weight_name, call.layer.bias_name) if n is not None]
        return len(names) != len(set(names))

    def _sum(self, total: Gradient, parts: list[tuple[Tensor, Tensor]]) -> Gradient:
        """`total` plus each call's part, for its weight and, summed, for its bias."""
        for call, (by_weight, signal) in zip(self.calls, parts, strict=True):
            layer = call.layer
            if layer.weight_name is not None:
                total[layer.weight_name] = total.get(layer.weight_name, 0) + by_weight
            if layer.bias_name is not None:
                total[layer.bias_name] = total.get(layer.bias_name, 0) + layer.sum_bias(signal, self.problems)
        return total


@contextmanager
def _recorded(gradient: LossGradient, examples: int) -> Iterator[list[tuple[BilinearLayer, Tensor, Tensor]]]:
    """While it lasts, bilinear modules compute through their layer, which writes down operand and output."""
    names = {id(p): n for n, p in gradient.model.named_parameters() if p.requires_grad}
    recorded: list[tuple[BilinearLayer, Tensor, Tensor]] = []

    def recording(module: nn.Module) -> Any:
        # Taken now: during the call the model's parameters are others.
        weight, bias = (names.get(id(module._parameters.get(part))) for part in ("weight", "bias"))

        def forward(x: Tensor) -> Tensor:
            layer = layer_of(module, weight, bias)
            if layer is None:
                return type(module).forward(module, x)
            a = layer.operand(x, examples)
            z = layer(a)
            z = z if z.requires_grad else z.requires_grad_(True)
            recorded.append((layer, a, z))
            return z

        return forward

    # A module whose `forward` someone has replaced already is left alone.
    replaced = [m for m in gradient.model.modules() if type(m) in LAYERS and "forward" not in vars(m)]
    try:
        for module in replaced:
            module.forward = recording(module)
        yield recorded
    finally:
        for module in replaced:
            del module.forward
