"""One pass over a traced model: which step each call is, and whose value it takes."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from gradguard.chain import links
from gradguard.chain.activation import Shape
from gradguard.chain.rewiring import Rewire
from gradguard.chain.step_builder import StepBuilder
from gradguard.chain.steps import (
    Affine,
    MaxPool,
    Step,
    Sum,
    Tail,
)
from gradguard.chain.tracing import WAY_OUT, attribute_of, is_shape_query, name_of, nodes_of
from gradguard.errors import UnsupportedModelError


class Walker(StepBuilder):
    """The pass. `sources`: for each step the indices of the steps whose values it takes, -1 for the input."""

    def steps(self) -> tuple[Step | MaxPool | Sum, ...]:
        """Every step, first to last."""
        self._walk()
        self._check_end()
        if not any(isinstance(step, Affine) for step in self.found):
            raise UnsupportedModelError(f"{name_of(self.model)} has no Linear or Conv2d layer. {WAY_OUT}")
        return tuple(self.found)

    def _walk(self) -> None:
        for node in nodes_of(self.root, self.model):
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op != "output":
                self._call(node)
            elif node.args[0] is not self.current:
                raise UnsupportedModelError(
                    f"{name_of(self.model)} returns something else than the value of its last layer. {WAY_OUT}"
                )

    def _attribute(self, node: fx.Node) -> Any:
        """What `forward` reads off a module: in float64, as the model is computed, if it is a parameter or buffer."""
        value = operator.attrgetter(str(node.target))(self.root)
        name = self.names.get(id(value))
        if name is None:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            self.trained.add(node)
        return self.constants[name]

    def _check_end(self) -> None:
        """Raises `UnsupportedModelError` for values that are scaled or moved behind the last layer."""
        for step in reversed(self.found):
            if isinstance(step, Affine):
                break
            if isinstance(step, Rewire):
                raise UnsupportedModelError(
                    f"{step.name!r} ({step.kind}) scales or moves values behind the last layer. Leave it to the loss. "
                    f"{WAY_OUT}"
                )

    def _placeholder(self, node: fx.Node) -> None:
        if self.current is None:
            self.current, self.places[node] = node, -1
            self.values[node] = self._meta(self.input_shape)
        elif node.args:
            self.values[node] = node.args[0]
        else:
            raise UnsupportedModelError(f"{name_of(self.model)} takes more than one input ({node.target!r}). {WAY_OUT}")

    def _call(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if n in self.places]
        if node.op == "call_method" and node.target in links.LIKE_METHODS and self._constant_like(node):
            return
        if not sources or is_shape_query(node):
            self.values[node] = self._evaluate(node)
            if attribute_of(node) == "device":
                self.values[node] = self.gradient.device  # values here are on the meta device
            if self.trained & set(node.all_input_nodes):
                self.trained.add(node)
            return
        if self.branches and len(sources) == 2 and node.target in links.ADD_CALLS:
            self._add(Sum(name=self._path(node), input_shape=self._shape, output_shape=self._sum_shape(node)), node)
            return
        if self.branches and len(sources) == 1:
            self.current = sources[0]
        if sources != [self.current]:
            why = links.REFUSED_CALLS.get(
                node.target, "takes more than the value of the step before it (a branch or a skip)"
            )
            raise self._refusal(node, why)
        step = self._module_step(node) if node.op == "call_module" else self._function_step(node)
        if step is not None:
            if isinstance(step, Affine):
                self._check_no_tail(step)
            self._add(self._merged(step, node), node)
        else:
            self.values[node], self.places[node] = self.values[sources[0]], self.places[sources[0]]
            self.current = node

    def _add(self, step: Step | MaxPool | Sum, node: fx.Node) -> None:
        """`step` computes the value of `node`."""
        self.found.append(step)
        sources = tuple(self.places[n] for n in node.all_input_nodes if n in self.places)
        self.sources.append(sources if self._before is None else self._before)
        self._before = None
        self.values[node] = self._meta(step.output_shape)
        self.places[node], self.current = len(self.found) - 1, node

    def _constant_like(self, node: fx.Node) -> bool:
        """Take in a constant of the kind of the chain's value, `mean.to(x)` or `x.new_tensor(mean)`, if it is one."""
        first, *others = node.args
        if isinstance(first, fx.Node) and first in self.places:
            if not str(node.target).startswith("new_"):
                return False
            like = torch.zeros((), dtype=torch.float64, device=self.gradient.device)
            args, kwargs = fx.node.map_arg((tuple(others), node.kwargs), lambda n: self.values[n])
            self.values[node] = getattr(like, str(node.target))(*args, **kwargs)
            return True
        if isinstance(first, fx.Node) and any(n in self.places for n in node.all_input_nodes):
            self.values[node] = self.values[first].to(torch.float64)
            if first in self.trained:
                self.trained.add(node)
            return True
        return False

    def _merged(self, step: Step | MaxPool, node: fx.Node) -> Step | MaxPool:
        """`step` with a rewiring right before it taken in: two of them as one, padding as part of a convolution."""
        (source,) = (n for n in node.all_input_nodes if n in self.places)
        place = self.places[source]
        before = self.found[place] if place >= 0 else None
        if not isinstance(before, Rewire) or place < len(self.found) - 1 or not self._used_once(place):
            return step
        if isinstance(step, Rewire):
            self.found.pop()
            self._before = self.sources.pop()
            return step.after(before)
        apart = before.as_padding() if isinstance(step, Affine) and step.kind == "Conv2d" else None
        if apart is None or not isinstance(step, Affine):
            return step
        scale, padding = apart
        if scale is None:
            self.found.pop()
            self._before = self.sources.pop()
        else:
            self.found[place] = scale
        return replace(step, input_shape=before.input_shape, before=padding)

    def _used_once(self, place: int) -> bool:
        """Whether the value of step `place` goes one way only; what asks for its shape does not count."""
        names = [n for n, p in self.places.items() if p == place]
        return all(sum(not is_shape_query(user) for user in n.users) <= 1 for n in names)

    def _sum_shape(self, node: fx.Node) -> Shape:
        value = self._evaluate(node)
        shapes = {tuple(self.values[n].shape) for n in node.all_input_nodes}
        if len(node.args) != 2 or node.kwargs or shapes != {tuple(value.shape)}:
            raise self._refusal(node, "adds values of different shapes, or scaled ones")
        return tuple(value.shape[1:])

    def _check_no_tail(self, layer: Affine) -> None:
        for step in self.found:
            if isinstance(step, Tail):
                raise UnsupportedModelError(
                    f"Module {step.name!r} ({step.kind}) comes before layer {layer.name!r}; a softmax can only come "
                    f"last. {WAY_OUT}"
                )
