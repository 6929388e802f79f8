"""What to change in an architecture so that the recursion is stopped, and what the change costs.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 4.3, where CNN6 with fewer filters in one layer is CNN6-d.
Differs from the paper in: every layer and also stride and kernel are tried, and the changed model is analysed again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from gradguard.chain import Affine, ChannelScale, Graph
from gradguard.chain.walk import check_walkable, checked_shape, unwrapped, walk_graph
from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.leakage.rank import RankAnalysis, Verdict, rank_analysis

Change = Literal["filters", "stride", "kernel"]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change of one layer that leaves its input short.

    Args:
        layer: The module's path.
        change: What of it is changed.
        before: The value now.
        after: The value after the change.
        deficit: Of the layer after the change; `None` where not computed (the count still says that it is short).
        virtual_constraints: Of the layer after the change; `None` where not computed.
        verdict: Of the changed model.
        index: Of the changed model.
        parameters: Of the changed model relative to the original.
        flops: Of the changed model relative to the original (multiplications of the layers with weights, for one
            example).
        checked: Whether the changed model was built and analysed, or the count alone speaks.
    """

    layer: str
    change: Change
    before: int
    after: int
    deficit: int | None
    virtual_constraints: int | None
    verdict: Verdict | None
    index: float | None
    parameters: float | None
    flops: float | None
    checked: bool

    def __str__(self) -> str:
        text = f"{self.layer}: {self.change} {self.before} -> {self.after}"
        if not self.checked:
            return f"{text} (by the count alone; the model cannot be rebuilt, so change and analyse it yourself)"
        return (
            f"{text}: deficit {'-' if self.deficit is None else self.deficit} (virtual {self.virtual_constraints}), "
            f"{self.verdict}, index {self.index:.3f}, parameters x {self.parameters:.2f}, FLOPs x {self.flops:.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)


def advice(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    beyond_virtual: bool = True,
    limit: int = 3,
    max_unknowns: int = 4096,
) -> tuple[Advice, ...]:
    """The smallest changes of filters, stride or kernel of one convolution that leave its input short.

    A change counts if the layer then lacks more unknowns than its virtual constraints (`beyond_virtual`), or any at all
    (what stops R-GAP, but not an optimisation that uses them). Filters: the most with which the count alone
    says so; stride: the smallest larger one; kernel: the largest smaller one of the same parity, padding kept in step.
    First come those after which, by the count, no attack has enough to go on ("not recoverable"); an attack on all
    layers together often gets around the others. Within each kind, what changes parameters and FLOPs least is first. Of
    those the first `limit`, each checked by `rank_analysis` of the changed model.

    The changed model is built for `nn.Sequential` (nested or not) of plain layers, with the layers behind adapted; of
    others, the filters are advised by the count alone (`checked=False`).

    Args:
        model: As in `rank_analysis`.
        input_shape: Of one example.
        beyond_virtual: Whether the deficit must exceed the virtual constraints.
        limit: Largest number of changes, at least 1.
        max_unknowns: As in `rank_analysis`.

    Returns:
        The changes, best first. Empty if no change does it, or the model's layers are Linear only: the gradient of a
        linear layer always gives its input.

    Raises:
        InputError: As in `rank_analysis`, or if `limit` is below 1.
    """
    if limit < 1:
        raise InputError(f"`limit` must be at least 1, got {limit}.")
    check_walkable(model)
    model, input_shape = unwrapped(model), checked_shape(input_shape)
    graph = _graph(model, input_shape)
    if not _rebuildable(model):
        return _by_count(rank_analysis(model, input_shape, max_unknowns=max_unknowns), beyond_virtual)[:limit]
    size = _costs(graph)
    found: list[tuple[tuple[bool, float], Affine, Change, int, int, nn.Module, tuple[float, float]]] = []
    for layer, change, before, values in _changes(graph, beyond_virtual):
        for after in values:
            changed = _rebuilt(model, input_shape, layer.name, change, after)
            if changed is None:
                break
            other = _graph(changed, input_shape)
            if _is_short(other, layer.name, beyond_virtual):
                ratios = tuple(n / m for n, m in zip(_costs(other), size, strict=True))
                distance = sum(abs(math.log(ratio)) for ratio in ratios)
                found.append(
                    (
                        (not _is_lost(other, layer.name), distance),
                        layer,
                        change,
                        before,
                        after,
                        changed,
                        (ratios[0], ratios[1]),
                    )
                )
                break
    found.sort(key=lambda entry: entry[0])
    advised = []
    for _, layer, change, before, after, changed, (parameters, flops) in found[:limit]:
        analysis = rank_analysis(changed, input_shape, max_unknowns=max_unknowns)
        row = next(row for row in analysis.layers if row.name == layer.name)
        advised.append(
            Advice(
                layer=layer.name,
                change=change,
                before=before,
                after=after,
                deficit=row.deficit,
                virtual_constraints=row.virtual_constraints,
                verdict=analysis.verdict,
                index=analysis.index,
                parameters=parameters,
                flops=flops,
                checked=True,
            )
        )
    return tuple(advised)


def advised(model: nn.Module, input_shape: Sequence[int], change: Advice) -> nn.Module:
    """The model with a change made, the layers behind it adapted, all weights drawn afresh.

    Args:
        model: What `advice` was asked about.
        input_shape: Of one example.
        change: One of its answers.

    Returns:
        A new model.

    Raises:
        InputError: If the change was not `checked`: such a model cannot be rebuilt.
    """
    made = _rebuilt(model, input_shape, change.layer, change.change, change.after) if _rebuildable(model) else None
    if made is None:
        raise InputError(
            f"`model` cannot be rebuilt with {change.layer!r} changed: only `nn.Sequential` of plain layers can. Make "
            "the change in its code and call `rank_analysis` again."
        )
    return made.train(model.training)


def _graph(model: nn.Module, input_shape: Sequence[int]) -> Graph:
    return walk_graph(LossGradient(model, nn.MSELoss(), train_mode="eval"), input_shape)


def _costs(graph: Graph) -> tuple[int, int]:
    """Weights, and multiplications for one example."""
    layers = [step for step in graph.steps if isinstance(step, Affine)]
    flops = sum(layer.num_weights * (layer.outputs // layer.filters) for layer in layers)
    return sum(layer.num_weights for layer in layers), flops


def _changes(graph: Graph, beyond_virtual: bool) -> Iterator[tuple[Affine, Change, int, Sequence[int]]]:
    """What to try: the layer, what of it, its value now, and the values instead, the smallest change first."""
    for index in graph.affine_indices:
        layer = graph.steps[index]
        assert isinstance(layer, Affine)
        if layer.kind != "Conv2d" or layer.groups > 1:
            continue
        most = _most_filters(graph, index, beyond_virtual)
        if most is not None and most < layer.filters:
            yield layer, "filters", layer.filters, (most,)
        if layer.stride[0] == layer.stride[1]:
            yield layer, "stride", layer.stride[0], range(layer.stride[0] + 1, 2 * layer.stride[0] + 3)
        if layer.kernel[0] == layer.kernel[1] and layer.kernel[0] > 2:
            yield layer, "kernel", layer.kernel[0], range(layer.kernel[0] - 2, 0, -2)


def _most_filters(graph: Graph, index: int, beyond_virtual: bool) -> int | None:
    """The most filters with which the count says that the layer is short.

    The bound with all outputs known, so that it holds whatever a ReLU behind the layer hides.

    Returns:
        The number, `None` if there is none.
    """
    layer = graph.steps[index]
    assert isinstance(layer, Affine)
    needed = layer.unknowns - (_virtual(graph, index) if beyond_virtual else 0)
    for filters in range(layer.filters, 0, -1):
        if replace(layer, output_shape=(filters, *layer.output_shape[1:])).rank_bound() < needed:
            return filters
    return None


def _virtual(graph: Graph, index: int) -> int:
    before = graph.dominators[index] - {index}
    widths = [math.prod(graph.input_shape), *(math.prod(graph.steps[i].output_shape) for i in before)]
    return max(0, math.prod(graph.steps[index].input_shape) - min(widths))


def _is_short(graph: Graph, name: str, beyond_virtual: bool) -> bool:
    index = next(i for i in graph.affine_indices if graph.steps[i].name == name)
    layer = graph.steps[index]
    assert isinstance(layer, Affine)
    needed = layer.unknowns - (_virtual(graph, index) if beyond_virtual else 0)
    return layer.rank_bound() < needed


def _is_lost(graph: Graph, name: str) -> bool:
    """Whether the count says that the gradient does not determine the input, whatever the attack."""
    index = next(i for i in graph.affine_indices if graph.steps[i].name == name)
    layer = graph.steps[index]
    assert isinstance(layer, Affine)
    earlier = 0
    for step in graph.steps[:index]:
        if isinstance(step, Affine):
            earlier += step.num_weights + (step.filters if step.bias is not None else 0)
        elif isinstance(step, ChannelScale):
            earlier += step.input_shape[0] * sum(n is not None for n in (step.weight, step.bias))
    return layer.rank_bound() + earlier < math.prod(graph.input_shape)


def _by_count(analysis: RankAnalysis, beyond_virtual: bool) -> tuple[Advice, ...]:
    """For a model that cannot be rebuilt: fewer filters, as far as the count goes."""
    rows = [row for row in analysis.layers if row.blocking_filters and not (beyond_virtual and row.virtual_constraints)]
    return tuple(
        Advice(
            layer=row.name,
            change="filters",
            before=row.filters,
            after=row.blocking_filters or 0,
            deficit=None,
            virtual_constraints=row.virtual_constraints,
            verdict=None,
            index=None,
            parameters=None,
            flops=None,
            checked=False,
        )
        for row in rows
        if row.inevitable and row.filters > (row.blocking_filters or 0)
    )


def _rebuildable(model: nn.Module) -> bool:
    """Whether the model is `nn.Sequential` all the way down, of modules that torch defines."""
    if type(model) is nn.Sequential:
        return all(_rebuildable(child) for child in model)
    return type(model).__module__.startswith("torch.nn.") and not list(model.children())


def _rebuilt(model: nn.Module, input_shape: Sequence[int], name: str, change: Change, after: int) -> nn.Module | None:
    """`model` with that change and fresh weights, the layers behind adapted; `None` if a layer gets nothing to do."""
    value = torch.zeros(1, *input_shape)

    def build(module: nn.Module, path: str) -> nn.Module:
        nonlocal value
        if isinstance(module, nn.Sequential):
            return nn.Sequential(*(build(m, f"{path}.{n}".lstrip(".")) for n, m in module.named_children()))
        made = copy.deepcopy(module)
        if isinstance(module, nn.Conv2d):
            other = _changed(module, change, after) if path == name else {}
            made = nn.Conv2d(**(_options(module) | {"in_channels": value.shape[1]} | other))
        elif isinstance(module, nn.Linear):
            made = nn.Linear(value.shape[1], module.out_features, bias=module.bias is not None)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            made = type(module)(value.shape[1])
        value = made.eval()(value)
        return made

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return build(model, "")
    except (RuntimeError, ValueError):
        return None


def _options(module: nn.Conv2d) -> dict[str, Any]:
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}


def _changed(module: nn.Conv2d, change: Change, after: int) -> dict[str, Any]:
    if change == "filters":
        return {"out_channels": after}
    if change == "stride":
        return {"stride": after}
    less = (module.kernel_size[0] - after) // 2 * module.dilation[0]
    padding = module.padding if isinstance(module.padding, str) else tuple(max(0, p - less) for p in module.padding)
    return {"kernel_size": after, "padding": padding}
