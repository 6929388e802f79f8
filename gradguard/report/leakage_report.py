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

from gradguard.report.scores import AttackScore, LabelScore, best_per_example, best_psnr, best_ssim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Decision = Literal["send", "perturb", "block", "unproven"]
Case = Literal["without", "with"]  # the gradient as it is, and as the defense sends it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with a gradient, and why.

    Args:
        decision: "send" it as it is, "perturb" it (send the perturbed one), "block" it (send neither), or "unproven":
            the policy's numbers are met, but what they rest on proves nothing (attacks that fail without a defense too,
            predictions that did not converge), so send neither.
        reasons: Sentences for people, at least one.
        noise_ratio: `|sent - true| / |true|` of the gradient that the decision is about.
        measures: The numbers the decision rests on, by name.
        looks_like: What the message was found to be, as in `gradguard.evaluation.differences.Difference`.
        explanation: Sentences for people on everything that is no plain gradient.
    """

    decision: Decision
    reasons: tuple[str, ...]
    noise_ratio: float
    measures: dict[str, float] = field(default_factory=dict)
    looks_like: str = "gradient"
    explanation: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LeakageReport:
    """Everything an audit of one batch found. Lists run over the batch's examples.

    What leaks is given in closed form (I2F, Zhang et al. 2023), per example, for an attacker who knows all the others,
    and as attacks found it.

    Args:
        model: The model's name.
        defense: The defense's name; `None` without one.
        input_shape: Of one example.
        labels: One per example.
        class_names: One per class.
        attacked: Indices into the batch of the examples that were attacked, in the order of the attacks' lists.
        gradient_norm: `|g|`.
        noise_ratio: `|delta| / |g|` of the defense (0 without one).
        predicted_error: `|x_hat - x|` of an attacker who matches the defended gradient, in input units (Euclidean norm
            over the example). One who also knows what pictures look like can come closer.
        predicted_converged: Whether the solver of `predicted_error` did.
        lower_bound: A cheap lower bound of `predicted_error`.
        lambda_max: The largest eigenvalue of `J J^T`.
        spectrum: Eigenvalues of `J J^T`, largest first, a list per example (all for small inputs, the leading ones
            otherwise).
        attacks: What attacks get: `attacks[name]["without" | "with"]` the defense. A name is the attack's own, with its
            settings where two have one name.
        label_recovery: `label_recovery["without" | "with"]`: the best of `label_attacks`.
        label_attacks: `label_attacks[name]["without" | "with"]`: every attack on the labels.
        prior_psnr: The mean of `guess_psnr`, dB.
        guess_psnr: dB per attacked example, what the best guess that looks at no gradient gets (the mean of the batch's
            others, or mid-range). No attack below it has learnt anything.
        verdict: What the policy says.
        environment: Versions, device, dtype, date.
        extra: Further sections of the main job (`accuracy`, `influence_check`) and the threat model's fields
            (`threat`), plain data.
        originals: Shape `(attacked, *input_shape)`; private like the attacks' pictures.
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
    label_attacks: dict[str, dict[Case, LabelScore]] = field(default_factory=dict)
    prior_psnr: float | None = None
    guess_psnr: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    environment: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    originals: Tensor | None = field(default=None, repr=False)

    # ------------------------------------------------------------------ what follows from the numbers

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)

    def worst_example(self) -> int | None:
        """The example that leaks most.

        It points at an example and judges nothing: examples whose number is missing are passed over.

        Returns:
            Its index into the batch: the highest PSNR of any attack on the defended gradient (on the bare one without a
            defense), or, where nothing was attacked, the lowest predicted error. `None` if neither is known.
        """
        scores = [cases.get("with", cases.get("without", AttackScore())) for cases in self.attacks.values()]
        best = zip(self.attacked, best_per_example(scores, len(self.attacked)), strict=True)
        known = {index: psnr for index, psnr in best if psnr is not None and not math.isnan(psnr)}
        if known:
            return max(known, key=lambda index: known[index])
        errors = [index for index, error in enumerate(self.predicted_error) if not math.isnan(error)]
        return min(errors, key=lambda index: self.predicted_error[index], default=None)

    def worst_class(self) -> str | None:
        """The class of the worst example."""
        worst = self.worst_example()
        return None if worst is None else self.class_name(self.labels[worst])

    def scores(self, case: Case) -> dict[str, AttackScore]:
        """What each attack got from one of the gradients."""
        return {name: cases[case] for name, cases in self.attacks.items() if case in cases}

    def best_psnr(self, case: Case) -> float | None:
        """The highest PSNR (dB) of any attack on any example, NaN if one is; `None` where nothing was attacked."""
        return best_psnr(self.scores(case).values())

    def best_ssim(self, case: Case) -> float | None:
        """The highest SSIM of any attack on any example; `None` where nothing was attacked, and for other inputs."""
        return best_ssim(self.scores(case).values())

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
