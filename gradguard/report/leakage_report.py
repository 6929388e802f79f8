"""What an audit found: plain numbers and pictures, serialisable, printable, plottable."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Decision = Literal["send", "perturb", "block"]
Case = Literal["without", "with"]  # the gradient as it is, and as the defense sends it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with a gradient, and why.

    `decision`: "send" it as it is, "perturb" it (send the perturbed one), or "block" it (send neither).
    `reasons`: sentences for people, at least one.
    `noise_ratio`: `|sent - true| / |true|` of the gradient that the decision is about.
    `measures`: the numbers the decision rests on, by name.
    `looks_like`: what the message is, compared with the batch's gradient: "gradient", "factor", "factors" (one per
        tensor), "rounding", "weight decay", "update" or "unexplained"; `explanation`: the same in sentences.
    """

    decision: Decision
    reasons: tuple[str, ...]
    noise_ratio: float
    measures: dict[str, float] = field(default_factory=dict)
    looks_like: str = "gradient"
    explanation: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttackScore:
    """How close one attack came to the truth, per example attacked.

    `psnr`: dB in [0, 1] pixel space; `ssim`: in [-1, 1]; `mse`: pixel units squared; each a list over examples.
    `matching_loss`: the attack's own relative squared gradient distance, mean over observations.
    `converged`: share of observations on which the attack converged by its own criterion.
    `seconds`: wall clock over all. `failure`: why the attack could not run; the lists are then empty.
    `pictures`: `(examples, *input_shape)`: private, written nowhere unless asked for.
    """

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    matching_loss: float = float("nan")
    converged: float = 0.0
    seconds: float = float("nan")
    failure: str | None = None
    pictures: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How much of the labels was recovered.

    `le_acc`: classes whose presence was told rightly, `ln_acc`: classes whose count was told rightly, both over all
    `C` classes; `i_rec`: `sum_c min(n_hat_c, n_c) / B`; all in [0, 1]. `recovered`, `true`: counts per class.
    """

    le_acc: float
    ln_acc: float
    i_rec: float
    recovered: list[int] = field(default_factory=list)
    true: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LeakageReport:
    """Everything an audit of one batch found. Lists run over the batch's examples.

    What was measured:
    `model`, `defense`: their names; `input_shape`, `labels`, `class_names`;
    `attacked`: indices (into the batch) of the examples that were attacked, in the order of the attacks' lists;
    `gradient_norm`: `|g|`; `noise_ratio`: `|delta| / |g|` of the defense (0 without one).

    What leaks, in closed form (I2F, Zhang et al. 2023); per example, the attacker knowing all the others:
    `predicted_error`: `|x_hat - x|` of a perfect attacker on the defended gradient, in input units (Euclidean norm
    over the example); `lower_bound`: its cheap lower bound; `lambda_max`: of `J J^T`;
    `predicted_converged`: whether the solver did; `spectrum`: eigenvalues of `J J^T`, largest first, a list per
    example (all for small inputs, the leading ones otherwise).

    What attacks get: `attacks[name]["without" | "with"]`, and `label_recovery["without" | "with"]`.
    `prior_psnr`: dB, what guessing the data's mean picture gets: no attack below it has learnt anything.

    `verdict`: what the policy says. `environment`: versions, device, dtype, date.
    `extra`: further sections of the main job (`accuracy`, `influence_check`) and the threat model's fields (`threat`),
    plain data.
    `originals`: `(attacked, *input_shape)`, private like the attacks' pictures.
    """

    model: str
    defense: str | None
    input_shape: tuple[int, ...]
    labels: list[int]
    class_names: tuple[str, ...] = ()
    attacked: list[int] = field(default_factory=list)
    gradient_norm: float
    noise_ratio: float
    predicted_error: list[float]
    predicted_converged: list[bool]
    lower_bound: list[float]
    lambda_max: list[float]
    spectrum: list[list[float]]
    attacks: dict[str, dict[Case, AttackScore]] = field(default_factory=dict)
    label_recovery: dict[Case, LabelScore] = field(default_factory=dict)
    prior_psnr: float | None = None
    verdict: Verdict | None = None
    environment: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    originals: Tensor | None = field(default=None, repr=False)

    # ------------------------------------------------------------------ what follows from the numbers

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def worst_example(self) -> int | None:
        """Index into the batch of the example that leaks most: highest PSNR of any attack on the defended gradient
        (on the bare one without a defense), or, where nothing was attacked, the lowest predicted error."""
        best: dict[int, float] = {}
        for cases in self.attacks.values():
            score = cases.get("with", cases.get("without"))
            for index, psnr in zip(self.attacked, score.psnr if score else [], strict=False):
                if not math.isnan(psnr):
                    best[index] = max(best.get(index, float("-inf")), psnr)
        if best:
            return max(best, key=lambda index: best[index])
        known = [index for index, error in enumerate(self.predicted_error) if not math.isnan(error)]
        return min(known, key=lambda index: self.predicted_error[index], default=None)

    def worst_class(self) -> str | None:
        """The class of the worst example."""
        worst = self.worst_example()
        return None if worst is None else self.class_name(self.labels[worst])

    def best_psnr(self, case: Case) -> float | None:
        """The highest PSNR (dB) of any attack on any example; `None` where nothing was attacked."""
        values = [p for cases in self.attacks.values() if case in cases for p in cases[case].psnr if not math.isnan(p)]
        return max(values) if values else None

    # ------------------------------------------------------------------ forms of it

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the pictures: they are private."""
        return _plain(self)

    def to_json(self) -> str:
        """`to_dict` as one line of JSON; non-finite numbers become `null`."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def print(self) -> None:
        """The report as tables on the terminal."""
        from gradguard.report.tables import print_report

        print_report(self)

    def plot(self) -> Figure:
        """Originals beside what each attack got without and with the defense, and the spectrum, as one figure."""
        from gradguard.report.plots import plot_report

        return plot_report(self)

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, pictures included, readable by the owner only."""
        from gradguard.report.html import save_html

        return save_html(self, path)


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON types, tensors left out, non-finite numbers as `None`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {n: _plain(v) for n, v in pairs if not isinstance(v, Tensor) and n not in ("pictures", "originals")}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
