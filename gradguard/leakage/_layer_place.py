"""Where in a model a layer is: what follows it, what goes around it, and what the earlier gradients add."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gradguard.chain import Activation, Affine, ChannelScale, Graph, MaxPool, MeanPool, Reshape, Sum, Tail
from gradguard.functional.vectors import Gradient

_AROUND = "the input goes another way as well, whose constraints are not counted"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a model a layer is, as far as its verdict depends on it.

    `index`: of the step; `hidden`: whether a ReLU or a maximum pooling follows, which hides some of its outputs;
    `passing`: the most outputs of a filter that get through it, whatever the weights; `assumed`: whether the recursion
    knows its output on the analysis' word only; `earlier_gradients`, `virtual`: as in `LayerRank`;
    `inputs`: elements of the model's input; `inevitable`: whether every path from the input goes through the layer;
    `note`: what the ranks take for granted.
    """

    index: int
    hidden: bool
    passing: int
    assumed: bool
    virtual: int
    earlier_gradients: int
    inputs: int
    inevitable: bool
    note: str

    @classmethod
    def of(cls, graph: Graph, index: int, trainable: Gradient) -> Place:
        """`trainable`: the parameters whose gradients are sent, by name."""
        step = graph.steps[index]
        before = graph.dominators[index] - {index}
        widths = [math.prod(graph.input_shape), *(math.prod(graph.steps[i].output_shape) for i in before)]
        names = [
            name
            for earlier in graph.steps[:index]
            if isinstance(earlier, Affine | ChannelScale)
            for name in (earlier.weight, earlier.bias)
        ]
        following = _following(graph, index)
        inevitable = index in graph.dominators[-1]
        around = "" if inevitable or not _shares_input(graph, index) else _AROUND
        flat = [s for s in following if isinstance(s, MaxPool) or (isinstance(s, Activation) and s.flat)]
        return cls(
            index=index,
            hidden=bool(flat),
            passing=_passing(graph, index),
            assumed=any(isinstance(s, MaxPool) for s in following)
            or (any(isinstance(s, Sum) for s in following) and not _separable(graph, index, trainable)),
            virtual=max(0, math.prod(step.input_shape) - min(widths)),
            earlier_gradients=sum(trainable[n].numel() for n in names if n in trainable),
            inputs=widths[0],
            inevitable=inevitable,
            note="; ".join(filter(None, (_note(following), around))),
        )


def _passing(graph: Graph, index: int) -> int:
    """Outputs of a filter that can get through the maximum pooling behind a step; all of them if there is none."""
    most = math.prod(graph.steps[index].output_shape[1:])
    while len(graph.consumers[index]) == 1:
        (index,) = graph.consumers[index]
        step = graph.steps[index]
        if isinstance(step, Affine | MeanPool | Sum | Tail):
            break
        if isinstance(step, MaxPool):
            most = min(most, math.prod(step.output_shape[1:]))
    return most


def _shares_input(graph: Graph, index: int) -> bool:
    """Whether the layer's input, up to what can be undone, is also the input of something else."""
    while True:
        (source,) = graph.sources[index]
        if source < 0:
            return sum(-1 in sources for sources in graph.sources) > 1
        if len(graph.consumers[source]) > 1:
            return True
        if isinstance(graph.steps[source], Affine | MeanPool | Sum):
            return False
        index = source


def _following(graph: Graph, index: int) -> list[Any]:
    """The steps that the value of a step goes through until the next layers, sums only if no way avoids them."""
    direct, reached = _until_layers(graph, index, sums=False)
    if not reached:
        direct, reached = _until_layers(graph, index, sums=True)
    return direct if reached else []  # behind the last layer is nothing but the loss


def _separable(graph: Graph, index: int, trainable: Gradient) -> bool:
    """Whether R-GAP tells a layer's output from the other summand: `Chain.check_invertible` asks for the same."""
    layer = graph.steps[index]
    if not isinstance(layer, Affine) or layer.weight not in trainable:
        return False
    summed = False
    while len(graph.consumers[index]) == 1:
        (index,) = graph.consumers[index]
        step = graph.steps[index]
        if not summed and not isinstance(step, ChannelScale | Reshape | Sum):
            return False
        if summed and isinstance(step, Affine | Sum | Tail):
            break
        if isinstance(step, MeanPool | MaxPool) or (isinstance(step, Activation) and step.flat):
            return False
        summed = summed or isinstance(step, Sum)
    return summed and layer.gradient_rank_bound() == layer.unknowns


def _until_layers(graph: Graph, index: int, *, sums: bool) -> tuple[list[Any], bool]:
    """The steps between a step and the next layers, and whether there is a next one. `sums`: go on behind them."""
    consumers = graph.consumers
    found: set[int] = set()
    waiting, reached = list(consumers[index]), False
    while waiting:
        place = waiting.pop()
        step = graph.steps[place]
        if isinstance(step, Affine | MeanPool):
            reached = True
        elif place not in found and (sums or not isinstance(step, Sum)):
            found.add(place)
            waiting += consumers[place]
    return [graph.steps[i] for i in sorted(found)], reached


def _note(following: list[Any]) -> str:
    """What the ranks take for granted about the layer's output."""
    notes = []
    for step in following:
        if isinstance(step, Activation) and step.flat:
            notes.append(f"{step.kind} is not one-to-one: outputs that it cuts off give no equation")
        elif isinstance(step, Activation) and not step.invertible:
            notes.append(
                f"{step.kind} is not one-to-one: which of two arguments an output has counts as known, and R-GAP tells "
                "them apart by the equations that are to spare"
            )
        elif isinstance(step, MaxPool):
            notes.append(f"{step.kind} is taken to tell where the maxima were; other outputs give no equation")
        elif isinstance(step, Sum):
            notes.append("the output is known as part of a sum only, which the ranks take as separated")
    return "; ".join(dict.fromkeys(notes))
