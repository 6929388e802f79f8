"""Rank analysis: what a gradient determines about each layer's input, from the architecture alone.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 4. Differs from the paper in: the constraints are ranked, not
counted (weight and gradient constraints overlap, so a count promises too much), and padding is no unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gradguard.chain import Activation, Affine, Chain, walk
from gradguard.errors import InputError
from gradguard.gradients import Gradient, LossGradient
from gradguard.leakage.constraint_rank import ConstraintRank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["closed form", "optimisation only", "not recoverable", "unknown"]
_FROM_BEST_TO_WORST: tuple[Verdict, ...] = ("closed form", "unknown", "optimisation only", "not recoverable")


@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """What is known about the input of one layer, once its output and the loss's derivative by it are known.

    `name`: the module's path; `unknowns`: elements of the input; `outputs`: weight constraints `W x = z`; `weights`:
    gradient constraints `grad W = k (*) x` (0 for a frozen weight). `rank_weights`, `rank_gradients`, `rank`: the ranks
    of each kind and of both stacked, `None` where not computed. `deficit`: unknowns that neither determines.
    `virtual_constraints`: what the layer can owe to earlier ones at most, `max(0, |x_i| - min_{j<i} |x_j|)`.
    `verdict`: "closed form" (no deficit), "optimisation only" (the deficit is within the virtual constraints, which
    only an attack on all layers together can use), "not recoverable", or "unknown".
    `blocking_filters`: the most filters with which the count alone leaves the layer short, the rest of the model
    unchanged; `None` if no number does. `method`: how `rank` was found: "exact", or "estimated" from random probes.
    `note`: what the verdict assumes.
    """

    name: str
    kind: str
    unknowns: int
    outputs: int
    weights: int
    rank_weights: int | None
    rank_gradients: int | None
    rank: int | None
    deficit: int | None
    virtual_constraints: int
    verdict: Verdict
    blocking_filters: int | None
    method: Literal["exact", "estimated", "not computed"]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RankAnalysis:
    """`layers`: one `LayerRank` per Linear and Conv2d, first to last. `model`: its class; `input_shape`."""

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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        layers = [asdict(layer) for layer in self.layers]
        return {"model": self.model, "input_shape": list(self.input_shape), "verdict": self.verdict, "layers": layers}

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def print(self, file: IO[str] | None = None) -> None:
        """The table, on standard output or `file`."""
        from rich.console import Console
        from rich.table import Table

        title = f"Rank analysis of {self.model}, input {self.input_shape}: {self.verdict}"
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
    model's. `input_shape`: of one example. `max_unknowns`: the largest matrix that is formed; the rank of a layer above
    it is probed instead: a random input is solved for from its own constraints, and what is missing of it measures
    the deficit (exact if nothing is, else an estimate with a relative error of about `sqrt(2 / (deficit * probes))`).
    `probes`: how many. `generator`: the random numbers (default: the same ones each time).

    Activations that are not one-to-one (ReLU) are let through and noted. Raises `UnsupportedModelError` for a model
    that is no chain of layers (see `gradguard.chain`).
    """
    if max_unknowns < 1 or probes < 1:
        raise InputError(f"`max_unknowns` and `probes` must be at least 1, got {max_unknowns} and {probes}.")
    gradient = LossGradient(model, _no_loss, dtype=torch.float64, train_mode="eval")
    chain = walk(gradient, input_shape)
    trainable = gradient.parameters().keys()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = _random_parameters(chain, generator)
    derivatives = _random_derivatives(chain, parameters, generator)
    rows = []
    for number, index in enumerate(chain.affine_indices):
        layer = chain.steps[index]
        assert isinstance(layer, Affine)
        earlier = [before.unknowns for before in chain.layers[:number]]
        virtual = max(0, layer.unknowns - min(earlier)) if earlier else 0
        ranks = ConstraintRank(
            layer, parameters[layer.weight], derivatives[index], sent=layer.weight in trainable, limit=max_unknowns
        )
        rows.append(_layer_rank(ranks, virtual, _note(chain, index), probes, generator))
    return RankAnalysis(model=type(model).__name__, input_shape=chain.input_shape, layers=tuple(rows))


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """`LossGradient` wants a loss; none is evaluated."""
    return outputs.sum()


def _random_parameters(chain: Chain, generator: torch.Generator) -> Gradient:
    """Weights and biases in general position, of a size that keeps activations away from saturation."""
    parameters = {}
    for layer in chain.layers:
        taps = layer.kernel[0] * layer.kernel[1]
        shape: tuple[int, ...] = (layer.filters, layer.input_shape[0] // layer.groups)
        shape = shape if layer.kind == "Linear" else (*shape, *layer.kernel)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        parameters[layer.weight] = weight / (shape[1] * taps) ** 0.5
        if layer.bias is not None:
            parameters[layer.bias] = 0.1 * torch.randn(layer.filters, generator=generator, dtype=torch.float64)
    return parameters


def _random_derivatives(chain: Chain, parameters: Gradient, generator: torch.Generator) -> dict[int, Tensor]:
    """`k = dl/dz` at the output of each layer, by its index: random at the top, the chain rule below."""
    x = torch.rand(chain.input_shape, generator=generator, dtype=torch.float64)
    values = []
    last = chain.affine_indices[-1]
    for step in chain.steps[: last + 1]:
        values.append(x)
        x = step(x, parameters)
    k = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = {}
    for index in range(last, -1, -1):
        step = chain.steps[index]
        if isinstance(step, Affine):
            found[index] = k
            k = step.backward(k, parameters)
        elif isinstance(step, Activation):
            k = k * step.derivative(values[index])
        else:
            k = k.reshape(step.input_shape)
    return found


def _note(chain: Chain, index: int) -> str:
    """What the ranks take for granted about the layer's output."""
    following = chain.affine_indices[chain.affine_indices.index(index) + 1 :]
    between = chain.steps[index + 1 : following[0]] if following else ()
    hidden = [s for s in between if isinstance(s, Activation) and not s.invertible]
    if not hidden:
        return ""
    return f"{hidden[0].kind} is not one-to-one and hides part of the output, which the verdict takes as known"


def _layer_rank(ranks: ConstraintRank, virtual: int, note: str, probes: int, generator: torch.Generator) -> LayerRank:
    layer = ranks.layer
    method: Literal["exact", "estimated", "not computed"] = "exact"
    rank = ranks.rank
    if rank is None:
        missing = ranks.probed_deficit(probes, generator)
        method = "not computed" if missing is None else "exact" if missing == 0 else "estimated"
        rank = None if missing is None else layer.unknowns - round(missing)
    deficit = None if rank is None else layer.unknowns - rank
    verdict = _verdict(deficit, virtual, layer.unknowns - layer.rank_bound(gradients=ranks.sent))
    if method == "estimated" and deficit and abs(deficit - virtual) < 3 * (2 * deficit / probes) ** 0.5:
        verdict = "unknown"
    return LayerRank(
        name=layer.name,
        kind=layer.kind,
        unknowns=layer.unknowns,
        outputs=layer.outputs,
        weights=layer.num_weights if ranks.sent else 0,
        rank_weights=ranks.rank_weights,
        rank_gradients=ranks.rank_gradients,
        rank=rank,
        deficit=deficit,
        virtual_constraints=virtual,
        verdict=verdict,
        blocking_filters=_blocking_filters(layer, ranks.sent),
        method=method,
        note=note,
    )


def _verdict(deficit: int | None, virtual: int, least: int) -> Verdict:
    """`deficit`: `None` if unknown, then at least `least`."""
    if deficit is None:
        return "not recoverable" if least > virtual else "unknown"
    if deficit == 0:
        return "closed form"
    return "optimisation only" if deficit <= virtual else "not recoverable"


def _blocking_filters(layer: Affine, sent: bool) -> int | None:
    """The most filters with which the counting bound stays below the unknowns."""
    width = layer.outputs // layer.filters + layer.input_shape[0] * layer.kernel[0] * layer.kernel[1]
    most = None
    for filters in range(layer.groups, layer.groups * width + 1, layer.groups):
        other = replace(layer, output_shape=(filters, *layer.output_shape[1:]))
        if other.rank_bound(gradients=sent) == layer.unknowns:
            return most
        most = filters
    return None
