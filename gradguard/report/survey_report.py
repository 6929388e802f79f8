"""What a pass over a whole data set found: one number per example, and what follows from them per class."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.report.leakage_report import _plain
from gradguard.storage.checkpoint import read_tensors, write_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

#: The label of an example whose target is no class index.
NO_CLASS = -1
#: Columns, and whether a high value (or a low one) is the exposed side.
EXPOSED_IS_HIGH: dict[str, bool] = {
    "predicted_error": False,
    "lower_bound": False,
    "projection": False,
    "lambda_max": True,
    "noise_norm": False,
    "gradient_norm": True,
    "loss": True,
}
#: What tables and the JSON show of a distribution.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
DTYPES = {"label": torch.int64, "converged": torch.bool, "digest": torch.int64} | dict.fromkeys(
    EXPOSED_IS_HIGH, torch.float64
)


@dataclass(frozen=True, kw_only=True)
class ClassSummary:
    """One class under one measure.

    Args:
        label: The class.
        name: Its name.
        count: Its examples.
        mean: Over its examples.
        median: Over its examples.
        worst: The most exposed value: the lowest error, the highest `lambda_max`.
        worst_example: Index into the data of the example with that value.
        quantiles: Value by quantile, lowest value first.
    """

    label: int
    name: str
    count: int
    mean: float
    median: float
    worst: float
    worst_example: int
    quantiles: dict[float, float]


@dataclass(frozen=True, kw_only=True)
class ExampleSummary:
    """One example and its value in each column of `Survey`.

    Args:
        index: Its place in the data.
        label: Its class.
        name: The name of its class.
        loss: As in `Survey`, like the following ones.
        gradient_norm: `|g|`.
        noise_norm: `|delta|`.
        projection: `|J delta|`.
        lambda_max: Of `J J^T`.
        lower_bound: Of the predicted error, input units.
        predicted_error: I2F, input units.
        converged: Of the solver behind the error.
    """

    index: int
    label: int
    name: str
    loss: float
    gradient_norm: float
    noise_norm: float
    projection: float
    lambda_max: float
    lower_bound: float
    predicted_error: float
    converged: bool


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Every example of a data set, each measured as an attacker sees it who knows all the others.

    Columns are `(N,)` on the CPU, in the data's order, float64 unless said otherwise. The gradient is that of the
    example's own loss, a batch of one; `delta` is what the defense adds to it. An example on which the gradient does
    not depend at all (`lambda_max` 0) has an infinite error.

    Args:
        model: The model's name.
        defense: The defense's name.
        input_shape: Of one example.
        class_names: One per class.
        exact: Whether the predicted error was solved for.
        complete: Whether the pass reached its end.
        conditions: Everything that the numbers depend on except the data.
        environment: Versions, device, dtype, date.
        label: A column, int64; `NO_CLASS` for a target that is no class index.
        loss: A column: the example's own loss.
        gradient_norm: A column: `|g|`.
        noise_norm: A column: `|delta|`.
        projection: A column: `|J delta|`.
        lambda_max: A column: of `J J^T`, the Ritz value.
        lower_bound: A column: of the predicted error, `|J delta| / (lambda_max + residual)`, input units (Euclidean
            norm over the example).
        predicted_error: A column: I2F, input units; NaN where it was not asked for.
        converged: A column, bool: of the solver behind `error`.
        digest: A column, int64: a hash of input and target, by which a resumed pass knows its data again.
    """

    model: str
    defense: str
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    exact: bool
    complete: bool = True
    conditions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    label: Tensor = field(repr=False)
    loss: Tensor = field(repr=False)
    gradient_norm: Tensor = field(repr=False)
    noise_norm: Tensor = field(repr=False)
    projection: Tensor = field(repr=False)
    lambda_max: Tensor = field(repr=False)
    lower_bound: Tensor = field(repr=False)
    predicted_error: Tensor = field(repr=False)
    converged: Tensor = field(repr=False)
    digest: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.label)

    # ------------------------------------------------------------------ what follows from the numbers

    @property
    def measure(self) -> str:
        """The column that ranks examples: "predicted_error" where it was solved for, else "lower_bound"."""
        return "predicted_error" if self.exact else "lower_bound"

    @property
    def error(self) -> Tensor:
        """The column that ranks examples, `(N,)`, input units: of gradient matching, predicted. Small is bad."""
        return getattr(self, self.measure)

    @property
    def per_element(self) -> Tensor:
        """`error` as a root mean square over the example's elements, `(N,)`: 0.1 in [0, 1] is a PSNR of 20 dB."""
        return self.error / math.prod(self.input_shape) ** 0.5

    @property
    def spread(self) -> float:
        """The least exposed example's error over the most exposed one's, infinite errors left out; NaN of none."""
        known = self.error[self.error.isfinite()]
        return (known.max() / known.min()).item() if len(known) else math.nan

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        if label == NO_CLASS:
            return "no class"
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def quantiles(self, measure: str | None = None, at: Sequence[float] = QUANTILES) -> dict[float, float]:
        """Quantiles of a column over all examples: each is a value that an example has (the lower of two).

        Args:
            measure: A column. Default: that of `error`.
            at: Quantiles in [0, 1].

        Returns:
            Value by quantile.
        """
        return _quantiles(self._column(measure), at)

    def per_class(self, measure: str | None = None) -> list[ClassSummary]:
        """A summary of each class.

        Args:
            measure: A column. Default: that of `error`.

        Returns:
            A row per class, the class with the most exposed example first.
        """
        measure = measure or self.measure
        column, labels = self._column(measure), self.label.numpy()
        sign = -1.0 if EXPOSED_IS_HIGH[measure] else 1.0
        rows = []
        for label in np.unique(labels).tolist():
            places = np.flatnonzero(labels == label)
            values = column[places]
            place = int(np.argmin(sign * values))
            quantiles = _quantiles(values, QUANTILES)
            rows.append(
                ClassSummary(
                    label=label,
                    name=self.class_name(label),
                    count=len(values),
                    mean=float(values.mean()),
                    median=quantiles[0.5],
                    worst=float(values[place]),
                    worst_example=int(places[place]),
                    quantiles=quantiles,
                )
            )
        return sorted(rows, key=lambda row: sign * row.worst)

    def worst(self, k: int = 10, measure: str | None = None) -> list[ExampleSummary]:
        """The most exposed examples.

        Args:
            k: How many.
            measure: A column. Default: that of `error`.

        Returns:
            The most exposed first.
        """
        measure = measure or self.measure
        sign = -1.0 if EXPOSED_IS_HIGH.get(measure) else 1.0
        order = np.argsort(sign * self._column(measure), kind="stable")[:k]
        return [self.example(int(index)) for index in order]

    def example(self, index: int) -> ExampleSummary:
        """Everything about one example."""
        names = [f.name for f in fields(ExampleSummary) if f.name in DTYPES]
        label = int(self.label[index])
        values = {name: getattr(self, name)[index].item() for name in names if name != "label"}
        return ExampleSummary(index=index, label=label, name=self.class_name(label), **values)

    def first(self, count: int) -> Survey:
        """The survey of the first `count` examples."""
        columns: dict[str, Any] = {name: getattr(self, name)[:count] for name in DTYPES}
        return replace(self, **columns)

    def _column(self, measure: str | None) -> np.ndarray:
        measure = measure or self.measure
        if measure not in EXPOSED_IS_HIGH:
            raise InputError(f"`measure` must be one of {', '.join(EXPOSED_IS_HIGH)}; got {measure!r}.")
        return getattr(self, measure).numpy()

    # ------------------------------------------------------------------ forms of it

    def to_dict(self, *, examples: bool = True) -> dict[str, Any]:
        """Plain JSON types, non-finite numbers as `None`.

        Args:
            examples: With the columns, one list each.

        Returns:
            The fields by name, and summaries: quantiles, classes, the most exposed examples.
        """
        measures = [m for m in EXPOSED_IS_HIGH if m != "predicted_error" or self.exact]
        found: dict[str, Any] = {
            "model": self.model,
            "defense": self.defense,
            "input_shape": self.input_shape,
            "class_names": self.class_names,
            "count": len(self),
            "complete": self.complete,
            "measure": self.measure,
            "spread": self.spread,
            "unconverged": int((~self.converged).sum()),
            "quantiles": {m: self.quantiles(m) for m in measures},
            "mean": {m: float(self._column(m).mean()) for m in measures},
            "classes": {m: [asdict(row) for row in self.per_class(m)] for m in measures},
            "worst": [asdict(row) for row in self.worst()],
            "conditions": self.conditions,
            "environment": self.environment,
        }
        if examples:
            found["examples"] = {n: getattr(self, n).tolist() for n in ("label", *measures, "converged")}
        return _plain(found)

    def to_json(self, *, examples: bool = True) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(examples=examples), allow_nan=False)

    def print(self, console: Console | None = None) -> None:
        """Tables on the terminal, readable from 80 columns on. `console`: where to (default: standard output)."""
        from gradguard.report.survey_tables import print_survey

        print_survey(self, console)

    def plot(self) -> Figure:
        """The distribution of the error per class, worst examples marked, and over all examples, as one figure."""
        from gradguard.report.survey_plots import plot_survey

        return plot_survey(self)

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page and the figure beside it as `survey.png`, readable by the owner only.

        It has no pictures of examples, only their places in the data, classes and numbers.

        Args:
            path: The page's file.

        Returns:
            The path.
        """
        from gradguard.report.survey_html import save_survey_html

        return save_survey_html(self, path)

    # ------------------------------------------------------------------ at rest

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, atomically, readable by the owner only: labels, losses and digests are private."""
        write_tensors(path, *self.parts())

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The columns, and the rest as plain data: what its file holds."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in DTYPES}
        return {name: getattr(self, name) for name in DTYPES}, rest

    @classmethod
    def load(cls, path: str | Path) -> Survey:
        """Read what `save` wrote. The file is not trusted: nothing in it is executed, and its columns are checked.

        Args:
            path: A safetensors file.

        Returns:
            The survey.

        Raises:
            InputError: If there is no such file or it is not a survey.
        """  # noqa: DOC501 (the `ValueError` below is caught)
        path = Path(path)
        if not path.is_file():
            raise InputError(f"There is no survey file {str(path)!r}.")
        try:
            tensors, rest = read_tensors(path)
            columns: dict[str, Any] = {name: tensors[name] for name in DTYPES}
            for name in ("input_shape", "class_names"):
                rest[name] = tuple(rest[name])
            survey = cls(**rest, **columns)
            wrong = [n for n, dtype in DTYPES.items() if columns[n].dtype != dtype or columns[n].ndim != 1]
            if wrong or len({len(column) for column in columns.values()}) != 1:
                raise ValueError(f"columns of unequal length or of the wrong type {wrong}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{str(path)!r} is not a survey that gradguard wrote ({error}). Name another file, or delete this one "
                "to start anew."
            ) from error
        return survey


def _quantiles(values: np.ndarray, at: Sequence[float]) -> dict[float, float]:
    # "lower": never a better number than an example has, and no infinity less infinity.
    return dict(zip(at, np.quantile(values, at, method="lower").tolist(), strict=True))
