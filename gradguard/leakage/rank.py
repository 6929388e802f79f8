"""Rank analysis: what a gradient determines about each layer's input, from the architecture alone.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 4. Differs from the paper in: the constraints are ranked, not
counted (weight and gradient constraints overlap, so a count promises too much), and padding is no unknown; a layer is
called not recoverable only if the gradients of the layers before it cannot make up for what it lacks either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gradguard.chain import Affine, ChannelScale, Graph, MeanPool, Tail
from gradguard.chain.walk import check_walkable, unwrapped, walk_graph
from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient
from gradguard.leakage._layer_place import Place
from gradguard.leakage.constraint_rank import ConstraintRank, pool_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["closed form", "optimisation only", "not recoverable", "unknown"]
_FROM_BEST_TO_WORST: tuple[Verdict, ...] = ("closed form", "unknown", "optimisation only", "not recoverable")


@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """What is known about the input of one layer, once its output and the loss's derivative by it are known.

    The layer is a Linear, a Conv2d, or an average pooling (which has no weights, hence no gradient constraints).

    Args:
        name: The module's path.
        kind: The module's type.
        filters: Its output channels.
        unknowns: Elements of the input.
        outputs: Weight constraints `W x = z`.
        weights: Gradient constraints `grad W = k (*) x` (0 for a frozen weight).
        rank_weights: The rank of the weight constraints, `None` where not computed.
        rank_gradients: The rank of the gradient constraints, `None` where not computed.
        rank: The rank of both stacked, `None` where not computed.
        deficit: Unknowns that neither determines, `None` where not computed.
        virtual_constraints: What the layer can owe to earlier ones at most, `max(0, |x_i| - min_{j<i} |x_j|)`.
        earlier_gradients: Elements of the gradient that belong to earlier layers, which an attack on all layers
            together can use as well.
        verdict: "closed form" (no deficit), "not recoverable" (`rank + earlier_gradients` is below the elements of the
            model's input, so that some change of the input changes nothing that is sent, to first order), "optimisation
            only" (in between: at best an attack on all layers together), or "unknown".
        blocking_filters: The most filters with which the count alone leaves the layer short, the rest of the model
            unchanged; `None` if no number does.
        method: How `rank` was found: "exact", "estimated" from random probes, or "not computed".
        rank_bound: What the count says that `rank` is at most.
        inevitable: Whether every way from the model's input to its output goes through the layer (not so inside of a
            residual block).
        note: What the verdict assumes.
    """

    name: str
    kind: str
    filters: int
    unknowns: int
    outputs: int
    weights: int
    rank_weights: int | None
    rank_gradients: int | None
    rank: int | None
    deficit: int | None
    virtual_constraints: int
    earlier_gradients: int
    verdict: Verdict
    blocking_filters: int | None
    method: Literal["exact", "estimated", "not computed"]
    rank_bound: int
    inevitable: bool = True
    note: str = ""

    @property
    def least_deficit(self) -> int:
        """`deficit`, or where it was not computed what the count alone leaves open."""
        return self.unknowns - self.rank_bound if self.deficit is None else self.deficit


@dataclass(frozen=True, kw_only=True)
class RankAnalysis:
    """What the gradient of one example determines, layer by layer.

    Args:
        model: The model's class.
        input_shape: Of one example.
        layers: One per Linear, Conv2d and average pooling, first to last.
    """

    model: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerRank, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the layers' verdicts: a recursion is as good as its weakest layer."""
        return max((layer.verdict for layer in self.layers), key=_FROM_BEST_TO_WORST.index)

    @property
    def blocking(self) -> tuple[LayerRank, ...]:
        """The layers that stop the closed form."""
        return tuple(layer for layer in self.layers if layer.verdict != "closed form")

    @property
    def index(self) -> float:
        """The largest share of a layer's unknowns that its constraints leave open, from 0 (closed form) to 1.

        Of the layers that no path goes around. Of one that was not computed, what the count alone leaves open. The
        paper's measure, the deficit (Zhu & Blaschko 2021, section 4), made comparable between architectures. It speaks
        of the closed form: an attack on all layers together can do with a layer that is short, see `verdict`.
        """
        return max((layer.least_deficit / layer.unknowns for layer in self.layers if layer.inevitable), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "model": self.model,
            "input_shape": list(self.input_shape),
            "verdict": self.verdict,
            "index": self.index,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def print(self, file: IO[str] | None = None) -> None:
        """The table, on standard output or `file`."""
        from rich.console import Console
        from rich.table import Table

        title = f"Rank analysis of {self.model}, input {self.input_shape}: {self.verdict}, index {self.index:.3f}"
        table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns wide
        table.add_column("layer", overflow="fold")
        for name in ("unknowns", "outputs", "weights", "rk W", "rk K", "rk A", "deficit", "virtual"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for layer in self.layers:
            about = "~" if layer.method == "estimated" else ""
            counts = (layer.unknowns, layer.outputs, layer.weights, layer.rank_weights, layer.rank_gradients)
            texts = ["-" if c is None else str(c) for c in counts]
            texts += ["-" if c is None else f"{about}{c}" for c in (layer.rank, layer.deficit)]
            table.add_row(layer.name, *texts, str(layer.virtual_constraints), layer.verdict)
        console = Console(file=file)
        if (width := console.measure(table).maximum) > console.width:  # large layers with long names
            console = Console(file=file, width=min(width, 120))
        console.print(table)
        for note in dict.fromkeys(layer.note for layer in self.layers if layer.note):
            names = ", ".join(layer.name for layer in self.layers if layer.note == note)
            console.print(f"{names}: {note}.", highlight=False, markup=False)

    def plot(self) -> Figure:
        """Per layer, how many of its unknowns the constraints determine, and how many are missing."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 + 0.8 * len(self.layers), 3.6), layout="constrained")
        axes = figure.subplots()
        places = list(range(len(self.layers)))
        parts: dict[str, tuple[str, list[int]]] = {
            "determined": ("tab:blue", [layer.rank or 0 for layer in self.layers]),
            "missing": ("tab:orange", [layer.deficit or 0 for layer in self.layers]),
            "not computed": ("tab:gray", [layer.unknowns if layer.rank is None else 0 for layer in self.layers]),
        }
        bottom = [0] * len(places)
        for label, (color, heights) in parts.items():
            if label != "not computed" or any(heights):
                axes.bar(places, heights, bottom=bottom, color=color, label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        needed = [layer.unknowns - layer.virtual_constraints for layer in self.layers]
        axes.plot(places, needed, "k_", markersize=22, label="needed by an optimisation")
        axes.set_xticks(places, [layer.name for layer in self.layers], rotation=45, ha="right")
        axes.set_ylabel("unknowns of the layer's input")
        axes.set_title(f"{self.model}: {self.verdict}")
        figure.legend(loc="outside right upper")
        return figure


def rank_analysis(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    max_unknowns: int = 4096,
    probes: int = 4,
    generator: torch.Generator | None = None,
) -> RankAnalysis:
    """What the gradient of one example determines, layer by layer.

    The ranks are those of random weights and a random input, in float64 on the CPU: the architecture's, not this
    model's.

    What the recursion cannot go through is let through on terms that favour the attacker, and noted: of ReLU and
    maximum pooling the zeros and the maxima's positions count as known, and the outputs that do not pass give no
    equation; of a sum (a residual block) both summands count as known, and of an activation with two branches (GELU)
    the right one. R-GAP finds ReLU's zeros and GELU's branch, but no maxima, and a summand only where the gradient of
    the layer that it comes from gives that layer's input and nothing hides part of the sum: a layer in front of others
    is "optimisation only" at best. Batch normalisation is that of eval mode.

    Args:
        model: Made of the layers of `gradguard.chain`.
        input_shape: Of one example.
        max_unknowns: The largest matrix that is formed, at least 1. The rank of a layer above it is probed instead: a
            random input is solved for from its own constraints, and what is missing of it measures the deficit (exact
            if nothing is, else an estimate with a relative error of about `sqrt(2 / (deficit * probes))`).
        probes: How many such inputs, at least 1.
        generator: Draws weights and inputs. Default: the same ones each time.

    Returns:
        A row per layer, and what they say together.

    Raises:
        InputError: If an option is outside its range, or `input_shape` does not fit the model.
        UnsupportedModelError: For a model made of anything else.
    """
    if not all(isinstance(n, int) and n >= 1 for n in (max_unknowns, probes)):
        raise InputError(f"`max_unknowns` and `probes` must be at least 1, got {max_unknowns!r} and {probes!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"`generator` must be a torch.Generator or None, got {type(generator).__name__}.")
    check_walkable(model)
    model = unwrapped(model)
    gradient = LossGradient(model, _no_loss, dtype=torch.float64, train_mode="eval")
    graph = walk_graph(gradient, input_shape)
    trainable = gradient.parameters()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = _random_parameters(graph, generator)
    derivatives = _random_derivatives(graph, parameters, generator)
    places = [Place.of(graph, i, trainable) for i, s in enumerate(graph.steps) if isinstance(s, Affine | MeanPool)]
    rows = []
    for place in places:
        step = graph.steps[place.index]
        if isinstance(step, MeanPool):
            rows.append(_pool_rank(step, place, max_unknowns))
            continue
        assert isinstance(step, Affine)
        k = derivatives[place.index]
        ranks = ConstraintRank(
            step,
            parameters[step.weight],
            k,
            sent=step.weight in trainable,
            limit=max_unknowns,
            known=k != 0 if place.hidden else None,
        )
        rows.append(_layer_rank(ranks, place, probes, generator))
    return RankAnalysis(model=type(model).__name__, input_shape=graph.input_shape, layers=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class RankCheck:
    """Whether an architecture itself stops the closed form.

    Args:
        fine: Whether the closed form is stopped somewhere.
        reasons: In words.
        analysis: What it follows from.
    """

    fine: bool
    reasons: tuple[str, ...]
    analysis: RankAnalysis


def rank_check(
    model: nn.Module, input_shape: Sequence[int], *, min_index: float = 0.0, max_unknowns: int = 4096
) -> RankCheck:
    """Before training: does the architecture itself stop the closed form, and by more than `min_index`?

    Not fine if every layer's input follows in closed form, or would but for what the recursion cannot undo (maximum
    pooling); if that is unknown; or if the index is below `min_index`.
    Fine means no more than that: an attack on all layers together may still succeed, see `RankAnalysis.verdict`.

    Args:
        model: As in `rank_analysis`.
        input_shape: Of one example.
        min_index: What `RankAnalysis.index` must reach, in [0, 1].
        max_unknowns: As in `rank_analysis`.

    Returns:
        The answer, its reasons, and the analysis.

    Raises:
        InputError: As in `rank_analysis`, or if `min_index` is outside its range.
    """
    if not 0 <= min_index <= 1:
        raise InputError(f"`min_index` must be between 0 and 1, got {min_index}.")
    analysis = rank_analysis(model, input_shape, max_unknowns=max_unknowns)
    reasons = []
    if analysis.verdict == "closed form":
        reasons.append("every layer gives its input away in closed form (R-GAP)")
    elif analysis.verdict == "unknown":
        names = ", ".join(repr(layer.name) for layer in analysis.layers if layer.verdict == "unknown")
        reasons.append(f"whether the closed form is stopped was too large to compute for {names}")
    elif analysis.index == 0:
        reasons.append(
            "no layer that every path goes through lacks equations, only what R-GAP cannot undo stops it (maximum "
            "pooling, sums), and an attack on all layers together need not care"
        )
    if analysis.index < min_index:
        reasons.append(f"the rank index is {analysis.index:.3f}, below {min_index:g}")
    return RankCheck(fine=not reasons, reasons=tuple(reasons), analysis=analysis)


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """`LossGradient` wants a loss; none is evaluated."""
    return outputs.sum()


def _random_parameters(graph: Graph, generator: torch.Generator) -> Gradient:
    """Weights and biases in general position, of a size that keeps activations away from saturation."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = {}
    for step in graph.steps:
        if isinstance(step, Affine):
            shape: tuple[int, ...] = (step.filters, step.input_shape[0] // step.groups)
            shape = shape if step.kind == "Linear" else (*shape, *step.kernel)
            parameters[step.weight] = random(*shape) / step.taps**0.5
            if step.bias is not None:
                parameters[step.bias] = 0.1 * random(step.filters)
        elif isinstance(step, ChannelScale):
            channels = step.input_shape[0]
            parameters[step.mean], parameters[step.variance] = 0.1 * random(channels), 1 + 0.1 * random(channels) ** 2
            if step.weight is not None:
                parameters[step.weight] = 1 + 0.1 * random(channels)
            if step.bias is not None:
                parameters[step.bias] = 0.1 * random(channels)
    return parameters


def _random_derivatives(graph: Graph, parameters: Gradient, generator: torch.Generator) -> dict[int, Tensor]:
    """`k = dl/dz` at the output of each layer, by its index: random at the top, the chain rule below."""
    x = torch.rand(graph.input_shape, generator=generator, dtype=torch.float64)
    values = graph.values(x.requires_grad_(), parameters)
    outputs = [values[i] for i in graph.affine_indices]
    top = values[-1] if not isinstance(graph.steps[-1], Tail) else values[graph.sources[-1][0]]
    k = torch.randn(top.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(top, outputs, k)
    return dict(zip(graph.affine_indices, found, strict=True))


def _layer_rank(ranks: ConstraintRank, place: Place, probes: int, generator: torch.Generator) -> LayerRank:
    layer = ranks.layer
    method: Literal["exact", "estimated", "not computed"] = "exact"
    bound = layer.rank_bound(gradients=ranks.sent, known=ranks.known)
    rank = ranks.rank
    if rank is None:
        missing = ranks.probed_deficit(probes, generator)
        method = "not computed" if missing is None else "exact" if missing == 0 else "estimated"
        rank = None if missing is None else layer.unknowns - round(missing)
    # How many outputs a ReLU hides is another number for each picture and training step: claim nothing from it. What a
    # maximum pooling lets through is at most what it puts out.
    sure = bound
    if place.hidden:
        through = torch.zeros(layer.filters, layer.outputs // layer.filters, dtype=torch.bool)
        through[:, : place.passing] = True
        limits = (None, through.reshape(layer.output_shape))
        sure = min(layer.rank_bound(gradients=ranks.sent, known=known) for known in limits)
    uncertainty = 0.0
    if rank is not None and method == "estimated":
        uncertainty = 3 * (2 * (layer.unknowns - rank) / probes) ** 0.5
    return LayerRank(
        name=layer.name,
        kind=layer.kind,
        filters=layer.filters,
        unknowns=layer.unknowns,
        outputs=layer.outputs if ranks.known is None else int(ranks.known.sum()),
        weights=layer.num_weights if ranks.sent else 0,
        rank_weights=ranks.rank_weights,
        rank_gradients=ranks.rank_gradients,
        rank=rank,
        deficit=None if rank is None else layer.unknowns - rank,
        virtual_constraints=place.virtual,
        earlier_gradients=place.earlier_gradients,
        verdict=_verdict(place, layer.unknowns, rank, bound, uncertainty, sure),
        blocking_filters=_blocking_filters(layer, ranks.sent),
        method=method,
        rank_bound=bound,
        inevitable=place.inevitable,
        note=place.note,
    )


def _pool_rank(pool: MeanPool, place: Place, limit: int) -> LayerRank:
    rank = pool_rank(pool, limit=limit)
    bound = min(pool.unknowns, pool.outputs)
    return LayerRank(
        name=pool.name,
        kind=pool.kind,
        filters=pool.output_shape[0],
        unknowns=pool.unknowns,
        outputs=pool.outputs,
        weights=0,
        rank_weights=rank,
        rank_gradients=0,
        rank=rank,
        deficit=None if rank is None else pool.unknowns - rank,
        virtual_constraints=place.virtual,
        earlier_gradients=place.earlier_gradients,
        verdict=_verdict(place, pool.unknowns, rank, bound, 0.0, bound),
        blocking_filters=None,
        method="not computed" if rank is None else "exact",
        rank_bound=bound,
        inevitable=place.inevitable,
        note=place.note,
    )


def _verdict(place: Place, unknowns: int, rank: int | None, bound: int, uncertainty: float, sure: int) -> Verdict:
    """`rank`: `None` if unknown, then at most `bound`; `uncertainty`: of `rank`; `sure`: what it never exceeds."""
    most = bound if rank is None else rank
    if most < unknowns:
        # What is sent depends on the input through this layer's constraints and the earlier layers' gradients only.
        spare = (sure if place.hidden else most) + place.earlier_gradients - place.inputs
        if place.inevitable and abs(spare) < uncertainty:
            return "unknown"
        return "not recoverable" if place.inevitable and spare < 0 else "optimisation only"
    if rank is None:
        return "unknown"
    return "optimisation only" if place.assumed else "closed form"


def _blocking_filters(layer: Affine, sent: bool) -> int | None:
    """The most filters with which the counting bound stays below the unknowns, all outputs known."""
    width = layer.outputs // layer.filters + layer.input_shape[0] * layer.kernel[0] * layer.kernel[1]
    most = None
    for filters in range(layer.groups, layer.groups * width + 1, layer.groups):
        other = replace(layer, output_shape=(filters, *layer.output_shape[1:]))
        if other.rank_bound(gradients=sent) == layer.unknowns:
            return most
        most = filters
    return None
