"""Initialisations and architectures side by side: how much each lets the gradient say, at equal noise.

Source: Zhang et al. 2023 (I2F), section 5: the initialisation a federated round starts from decides what its first
gradients leak. No attack is run: the influence function and its bound answer for many pictures and draws at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from gradguard.defenses import GaussianNoise
from gradguard.errors import InputError
from gradguard.evaluation.measurement import fits_dense, measure
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient
from gradguard.functional.structures import Rest, named_leaves, rows_of
from gradguard.functional.whole_batch import num_examples, take
from gradguard.report.theme import FONT, LIGHT, WIDTH, Theme, set_text, short, sparse_log_ticks, style_axes, title_style
from gradguard.threats.model import check_in_range, check_value_range

#: Sets a model's weights and biases in place, drawing from the generator.
Initialiser = Callable[[nn.Module, torch.Generator], None]


# ---------------------------------------------------------------------- initialisers


def uniform_(model: nn.Module, generator: torch.Generator, *, bound: float = 0.5) -> None:
    """Weights and biases uniform on `(-bound, bound)`: that of DLG and of I2F's tables."""
    for weights, biases in _layers(model):
        for parameter in (*weights, *biases):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def normal_(model: nn.Module, generator: torch.Generator, *, std: float = 0.1) -> None:
    """Weights and biases `N(0, std^2)`, the same in every layer."""
    for weights, biases in _layers(model):
        for parameter in (*weights, *biases):
            nn.init.normal_(parameter, 0.0, std, generator=generator)


def kaiming_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights `N(0, 2 / fan_in)` (He et al. 2015), biases zero."""
    for weights, biases in _layers(model):
        for weight in weights:
            nn.init.kaiming_normal_(weight, generator=generator)
        for bias in biases:
            nn.init.zeros_(bias)


def xavier_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights `N(0, 2 / (fan_in + fan_out))` (Glorot & Bengio 2010), biases zero."""
    for weights, biases in _layers(model):
        for weight in weights:
            nn.init.xavier_normal_(weight, generator=generator)
        for bias in biases:
            nn.init.zeros_(bias)


def as_built_(model: nn.Module, generator: torch.Generator) -> None:
    """Leave the model as its factory made it, to compare architectures, or trained weights with fresh ones."""


INITIALISATIONS: dict[str, Initialiser] = {
    "uniform": uniform_,
    "normal": normal_,
    "kaiming": kaiming_,
    "xavier": xavier_,
    "as built": as_built_,
}


def _layers(model: nn.Module) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Weights and biases of each layer that has a matrix or a kernel. Normalisation layers keep their 1 and 0."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        weights = [p for p in own if p.ndim >= 2]
        if weights:
            yield weights, [p for p in own if p.ndim < 2]


# ---------------------------------------------------------------------- the result


@dataclass(frozen=True, kw_only=True)
class InitialisationRow:
    """One architecture under one initialisation: a value per seed and example, examples running fastest.

    Args:
        model: The architecture's name.
        initialisation: Its name.
        num_parameters: `P`.
        lambda_max: The largest eigenvalue of `J J^T` of one example, a batch of its own.
        projected: `|J delta|`.
        bound: The I2F lower bound `|J delta| / lambda_max`, input units: low means that a perfect attacker may land
            close to the picture.
        exact: I2F itself, where it was computed.
        gradient_norm: `|g|` of the example.
        converged: The share of eigenvalues that Lanczos has found.
    """

    model: str
    initialisation: str
    num_parameters: int
    lambda_max: tuple[float, ...]
    projected: tuple[float, ...]
    bound: tuple[float, ...]
    exact: tuple[float, ...] | None
    gradient_norm: tuple[float, ...]
    converged: float

    @property
    def name(self) -> str:
        """Architecture and initialisation."""
        return f"{self.model}, {self.initialisation}"

    def median(self, measure: str) -> float | None:
        """The median over seeds and examples of `lambda_max`, `projected`, `bound`, `exact` or `gradient_norm`."""
        values = getattr(self, measure)
        return None if values is None else statistics.median(values)


@dataclass(frozen=True, kw_only=True)
class InitialisationComparison:
    """What `compare_initialisations` found.

    Args:
        rows: By architecture, then initialisation, in the order given.
        noise: In words.
        seeds: One draw of weights and of noise each.
        examples: How many.
    """

    rows: tuple[InitialisationRow, ...]
    noise: str
    seeds: tuple[int, ...]
    examples: int

    def ranking(self, measure: str = "bound") -> list[InitialisationRow]:
        """The rows from the riskiest on. Rows without the measure are left out.

        Args:
            measure: "bound" or "exact", lowest median first, or "lambda_max", "projected" or "gradient_norm", highest
                first.

        Returns:
            The rows in that order.

        Raises:
            InputError: If there is no such measure.
        """
        if measure not in ("bound", "exact", "lambda_max", "projected", "gradient_norm"):
            raise InputError(
                f'`measure` must be "bound", "exact", "lambda_max", "projected" or "gradient_norm", got {measure!r}.'
            )
        sign = 1 if measure in ("bound", "exact") else -1
        known = [(sign * value, row) for row in self.rows if (value := row.median(measure)) is not None]
        return [row for _, row in sorted(known, key=lambda pair: pair[0])]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def print(self) -> None:
        """A table on the terminal: medians, and the range of the bound."""
        table = Table(
            Column("model"),
            Column("initialisation"),
            *(
                Column(n, justify="right")
                for n in ("lambda_max", "|J delta|", "lower bound", "its range", "I2F", "|g|")
            ),
            title=f"Medians over {len(self.seeds)} seeds x {self.examples} examples, {self.noise}",
            title_justify="left",
        )
        for row in self.rows:
            numbers = [_number(row.median(m)) for m in ("lambda_max", "projected", "bound", "exact", "gradient_norm")]
            numbers.insert(3, f"{_number(min(row.bound))} to {_number(max(row.bound))}")
            table.add_row(row.model, row.initialisation, *numbers)
        Console().print(table)

    def plot(self, *, theme: Theme = LIGHT) -> Figure:
        """One figure: a lane per row, a dot per seed and example, a bar at the median; log axes, one per measure."""
        return _plot(self, theme)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------------- the experiment


def compare_initialisations(
    models: Mapping[str, Callable[[], nn.Module]],
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any,
    *,
    initialisations: Sequence[str] | Mapping[str, Initialiser] = ("uniform", "normal", "kaiming", "xavier"),
    noise_std: float | None = None,
    noise_ratio: float | None = None,
    seeds: Iterable[int] = range(3),
    exact: bool | None = None,
    dtype: torch.dtype = torch.float64,
    chunk_size: int | None = None,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    input_module: str | None = None,
    private: str | int | None = None,
) -> InitialisationComparison:
    """The influence of one and the same noise on gradients of networks that differ in how they were initialised.

    Networks are measured in eval mode. Each example is a batch of its own, as in the paper. All examples of a seed see
    the same draw of noise, up to its length.

    Args:
        models: Name -> factory of an architecture; more than one compares architectures.
        loss_fn: The loss.
        inputs: Shape `(B, *input_shape)`, or a structure, as in `LossGradient`; tokens where there is an
            `input_module`: each network then looks them up in its own table.
        targets: Shape `(B, ...)`, or a structure.
        initialisations: Names from `INITIALISATIONS`, or name -> `(model, generator) -> None` that sets the weights.
        noise_std: Gaussian noise of this standard deviation on every gradient. Default: `sqrt(1e-5)`, the paper's.
        noise_ratio: Instead, noise of this length relative to each example's gradient; weights that make gradients
            large then gain nothing by it.
        seeds: One draw of weights and of noise each.
        exact: Also solve for I2F. Default: where `J` is small enough to be formed.
        dtype: What it computes in.
        chunk_size: Examples at a time, a bound on memory.
        value_range: Of valid inputs, `None` for any. Others are refused: errors are read as shares of it.
        input_module: As in `LossGradient`.
        private: As in `LossGradient`.

    Returns:
        A row per architecture and initialisation.

    Raises:
        InputError: If there is nothing to compare, an initialisation is not known, or both kinds of noise are given.
    """
    check_value_range(value_range)
    if isinstance(inputs, Tensor) and input_module is None:
        check_in_range(inputs, value_range)
    if noise_std is not None and noise_ratio is not None:
        raise InputError(f"Give at most one of `noise_std` and `noise_ratio`, got {noise_std} and {noise_ratio}.")
    ratio = noise_ratio is not None
    strength = noise_ratio if noise_ratio is not None else math.sqrt(1e-5) if noise_std is None else noise_std
    # The defense says what is wrong with a strength.
    noise = GaussianNoise(noise_ratio=strength) if ratio else GaussianNoise(std=strength)
    initialisers, seeds = _initialisers(initialisations), tuple(seeds)
    if not models or not seeds:
        raise InputError(f"`models` and `seeds` must not be empty, got {list(models)} and {seeds}.")

    device = next((leaf.device for _, leaf in named_leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))

    def row(model_name: str, name: str) -> InitialisationRow:
        draws = []
        for seed in seeds:
            model = _drawn(models[model_name], initialisers[name], seed).to(device)
            function = LossGradient(model, loss_fn, dtype=dtype, input_module=input_module, private=private)
            bound, own, rest = take(function, inputs, targets)
            check_in_range(own, value_range)
            draws.append(_measured(bound, own, rest, noise, seed, exact, chunk_size))
        measures = {n: tuple(v for d in draws for v in d[n].tolist()) for n in ("lambda_max", "projected", "bound")}
        return InitialisationRow(
            model=model_name,
            initialisation=name,
            num_parameters=function.num_parameters,
            **measures,
            exact=tuple(v for d in draws for v in d["exact"].tolist()) if "exact" in draws[0] else None,
            gradient_norm=tuple(v for d in draws for v in d["gradient_norm"].tolist()),
            converged=statistics.mean(v for d in draws for v in d["converged"].tolist()),
        )

    rows = tuple(row(model_name, name) for model_name in models for name in initialisers)
    words = f"noise of {strength:.3g} |g|" if ratio else f"noise of standard deviation {strength:.3g}"
    return InitialisationComparison(rows=rows, noise=words, seeds=seeds, examples=num_examples(inputs))


def _initialisers(chosen: Sequence[str] | Mapping[str, Initialiser]) -> dict[str, Initialiser]:
    if isinstance(chosen, str):
        chosen = (chosen,)
    if not chosen:
        raise InputError("`initialisations` must not be empty.")
    if isinstance(chosen, Mapping):
        return dict(chosen)
    unknown = [name for name in chosen if name not in INITIALISATIONS]
    if unknown:
        raise InputError(
            f"`initialisations` must be among {sorted(INITIALISATIONS)}, got {unknown[0]!r}. For one of your own pass "
            "a mapping name -> function(model, generator) that sets the weights."
        )
    return {name: INITIALISATIONS[name] for name in chosen}


def _drawn(factory: Callable[[], nn.Module], initialiser: Initialiser, seed: int) -> nn.Module:
    """A model of `factory`, initialised on the CPU: the same numbers on every device, the global state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
    with torch.no_grad():
        initialiser(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _measured(
    function: LossGradient,
    inputs: Tensor,
    targets: Rest,
    noise: GaussianNoise,
    seed: int,
    exact: bool | None,
    chunk_size: int | None,
) -> dict[str, Tensor]:
    """All measures of one draw of weights and noise: `(B,)` each."""
    function.check_batch(inputs, targets)
    x, y = function.cast(inputs)[:, None], rows_of(function.cast(targets), (slice(None), None))
    jacobian = InputJacobian.of_trials(function, x, y, chunk_size=chunk_size)
    parameters = function.parameters()
    generator = torch.Generator().manual_seed(seed)
    length = _gradient_norms(function, inputs, targets, chunk_size)
    # In units of one gradient's length where it is relative, and scaled per example: everything is linear in delta.
    if noise.std is None:
        like = {n: torch.full_like(p, function.num_parameters**-0.5) for n, p in parameters.items()}
        scale = length
    else:
        like, scale = parameters, torch.ones_like(length)
    delta = noise.perturbation(like, generator=generator)
    exact = fits_dense(jacobian) if exact is None else exact
    # Tighter than the default: here lambda_max is itself a result.
    measures = measure(jacobian, delta, exact=exact, tolerance=1e-2, generator=generator)
    found = {
        "lambda_max": measures.lambda_max,
        "projected": scale * measures.projected,
        "bound": scale * measures.lower_bound,
        "gradient_norm": length,
        "converged": measures.bound_converged.double(),
    }
    if exact:
        found["exact"] = scale * measures.predicted_error
    return found


def _gradient_norms(function: LossGradient, inputs: Tensor, targets: Rest, chunk_size: int | None) -> Tensor:
    """`|g|` of each example: `(B,)`."""
    chunks = range(0, len(inputs), chunk_size or len(inputs))
    norms = []
    for start in chunks:
        part = slice(start, start + (chunk_size or len(inputs)))
        squares = [
            v.flatten(1).square().sum(1) for v in function.per_example(inputs[part], rows_of(targets, part)).values()
        ]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(norms)


# ---------------------------------------------------------------------- the figure

_PANELS = {
    "lambda_max": "largest eigenvalue of J Jᵀ",
    "projected": "|J delta|",
    "bound": "I2F lower bound, input units",
    "exact": "I2F, input units",
}


def _plot(comparison: InitialisationComparison, theme: Theme) -> Figure:
    rows = comparison.rows
    panels = [m for m in _PANELS if m != "exact" or any(row.exact for row in rows)]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.34 * len(rows)), layout="constrained", facecolor=theme.background)
    figure.suptitle(f"What the gradient says, at {comparison.noise}: a low bound means exposed", **title_style(theme))
    names = list(dict.fromkeys(row.initialisation for row in rows))
    several = len({row.model for row in rows}) > 1
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    jitter = np.random.default_rng(0)
    for axes, name in zip(grid, panels, strict=True):
        for lane, row in enumerate(rows):
            values = np.asarray(getattr(row, name) or (), dtype=float)
            values = values[np.isfinite(values) & (values > 0)]
            color = theme.series[names.index(row.initialisation) % len(theme.series)]
            heights = lane + jitter.uniform(-0.22, 0.22, len(values))
            axes.plot(values, heights, "o", color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
            if len(values):
                middle = float(np.median(values))
                axes.plot([middle, middle], [lane - 0.36, lane + 0.36], color=color, linewidth=2.2, zorder=3)
        axes.set_xscale("log")
        style_axes(axes, theme, _PANELS[name], "")
        sparse_log_ticks(axes)
        axes.grid(axis="x", color=theme.grid, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    labels = [short(row.name if several else row.initialisation, 34) for row in rows]
    grid[0].set_yticks(range(len(rows)))
    set_text(grid[0].set_yticklabels, labels, color=theme.ink, size=9.5)
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    grid[0].tick_params(axis="y", labelfontfamily=FONT)
    return figure
