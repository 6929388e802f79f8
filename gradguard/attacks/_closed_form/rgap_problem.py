"""What R-GAP solves: an observation as a chain with a start, and the choice among its candidates.

Source: Zhu & Blaschko 2021 (arXiv 2010.07733), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradguard.attacks._closed_form.heads import (
    Head,
    bias_head,
    is_softmax_cross_entropy,
    logistic_heads,
    logistic_targets,
    recover_targets,
    softmax_heads,
    squared_error_heads,
    squared_error_targets,
)
from gradguard.chain import Affine, Chain, LayerSystem, Residual, all_parameters, walk
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.threats.observation import Observation

#: A matching loss that only the truth reaches: the other candidates need not be tried. Gradients rounded to float32
#: leave about 1e-13, a wrong candidate 1e-3 and more.
PERFECT = 1e-10
#: Share of a picture that may lie outside of the value range, as rounding leaves it there.
_IN_RANGE = 1e-3


@dataclass(frozen=True)
class Trial:
    """A candidate's picture `x`, the targets it assumes or implies, its matching loss and its report's rows.

    `systems`: the equations of the layers that were solved, by name, last layer first.
    """

    loss: float
    x: Tensor
    targets: Tensor | None
    head: Head
    rows: list[dict[str, Any]]
    systems: tuple[tuple[str, LayerSystem], ...] = ()


class Problem:
    """An observation of one example in float64, its model as a chain, and where the recursion starts.

    `start_index`: of the layer in the chain's steps; `kind`: how its input is found, "bias", "logistic", "softmax" or
    "squared"; `chain`: the model's, if it has been walked.
    Raises what `RGAP.check` raises.
    """

    def __init__(self, observation: Observation, chain: Chain | None = None) -> None:
        self.observation = observation.in_dtype(torch.float64)
        self.function = self.observation.loss_gradient
        self.sent = self.observation.sent
        self.chain = chain or walk(self.function, observation.input_shape, residual=True)
        self.parameters = all_parameters(self.function)
        labels = self.observation.labels
        self.labels = None if labels is None else self.function.cast(labels)
        self.last = self._last()
        self.start_index, self.kind = self._start()
        start = self.chain.steps[self.start_index]
        assert isinstance(start, Affine)
        self.start = start
        self.chain.check_invertible(self.start_index, partly=True)
        self._check_branches()

    def top(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss as a function of the last layer's output, shape `(1, C)`."""
        values = self.chain(outputs[0], self.parameters, start=self.chain.affine_indices[-1] + 1)
        return self.function.loss_fn(values[None], targets)

    def heads(self) -> list[Head]:
        """The candidates for the start."""
        weight, weight_gradient = self.parameters[self.start.weight], self.sent[self.start.weight]
        if self.kind == "bias":
            assert self.start.bias is not None
            return [bias_head(weight_gradient, self.sent[self.start.bias])]
        if self.kind == "logistic":
            return logistic_heads(weight, weight_gradient, logistic_targets(self.top, self.labels, weight))
        if self.kind == "squared":
            targets = squared_error_targets(self.top, self.last.filters, self.labels, weight)
            return squared_error_heads(weight, weight_gradient, targets)
        return softmax_heads(weight, weight_gradient, self.labels)

    def trial(
        self, x: Tensor, head: Head, rows: list[dict[str, Any]], systems: tuple[tuple[str, LayerSystem], ...] = ()
    ) -> Trial:
        """`x` as a candidate, with its matching loss (`nan` if the loss's targets are unknown)."""
        targets = self._targets(x, head)
        loss = math.nan if targets is None else self.observation.matching_loss(x[None], targets)
        if targets is not None and math.isnan(loss):
            loss = math.inf  # an overflow; nan would win every comparison
        return Trial(loss, x, targets, head, rows, systems)

    def choose(self, found: list[Trial]) -> tuple[Trial, int]:
        """The candidate with the lowest matching loss, and how many others match as well.

        Twins (Zhu & Blaschko 2021, section 3.1): without biases, LeakyReLU makes a model homogeneous, and the pictures
        of both margins have the same gradient. Only what valid pictures look like tells them apart: the one that keeps
        to the value range, the brighter of two that do; the smaller one if no range is known.
        """
        if len(found) == 1:
            return found[0], 0
        equals = _equals(found)
        return min(equals, key=self._implausibility), len(equals) - 1

    def unproved(self, best: Trial, found: list[Trial], open_layers: list[str], tolerance: float) -> list[str]:
        """Why `best` may be another input than the one whose gradient was sent, in sentences; empty if it cannot.

        `open_layers`: those whose equations do not determine their input, although they are enough by count;
        `tolerance`: of the attack.
        """
        reasons = []
        if open_layers:
            names = ", ".join(map(repr, open_layers))
            reasons.append(f"The equations of {names} are enough by count, and do not determine the layer's input.")
        if best.loss > max(tolerance**2, PERFECT):
            reasons.append(f"The gradient of what was found is not the one sent (matching loss {best.loss:.1e}).")
        others = [trial for trial in _equals(found) if trial is not best] if len(found) > 1 else []
        if any(self._implausibility(trial)[0] <= _IN_RANGE for trial in others):
            reasons.append("Another valid input has the same gradient.")
        if self.kind == "squared" and self.labels is None and self._homogeneous(best.x):
            reasons.append("The target is a guess, and with another one a multiple of the input has the same gradient.")
        return reasons

    def _homogeneous(self, x: Tensor) -> bool:
        """Whether twice the input is twice the start's input."""
        once, twice = (self.chain(v, self.parameters, stop=self.start_index) for v in (x, 2 * x))
        return bool(torch.linalg.vector_norm(twice - 2 * once) <= 1e-6 * torch.linalg.vector_norm(twice))

    def _implausibility(self, trial: Trial) -> tuple[float, float]:
        size = float(torch.linalg.vector_norm(trial.x))
        if self.observation.value_range is None:
            return 0.0, size
        low, high = self.observation.value_range
        excess = float(torch.linalg.vector_norm(trial.x - trial.x.clamp(low, high)))
        return max(excess / size if size else 0.0, _IN_RANGE), -size

    def _targets(self, x: Tensor, head: Head) -> Tensor | None:
        """What the loss was given: known, assumed by the candidate, or read off the outputs' gradient at `x`."""
        if self.labels is not None or head.targets is not None:
            return self.labels if self.labels is not None else head.targets
        if self.last.kind != "Linear" or self.last.weight not in self.sent:
            return None
        features = self.chain(x, self.parameters, stop=self.chain.affine_indices[-1])
        k = self.sent[self.last.weight] @ features / features.square().sum()
        return recover_targets(self.top, k)

    def _last(self) -> Affine:
        """The last layer that is not inside of a residual block."""
        if not self.chain.affine_indices:
            raise UnsupportedModelError(
                "R-GAP starts at a linear layer behind the residual blocks, and this model has none. Attack by "
                "gradient matching."
            )
        layer = self.chain.steps[self.chain.affine_indices[-1]]
        assert isinstance(layer, Affine)
        return layer

    def _check_branches(self) -> None:
        """Raises `UnsupportedModelError` if a residual branch ends in a layer whose gradient is not sent."""
        for block in self.chain.steps[: self.start_index]:
            if isinstance(block, Residual):
                layer = block.branch[block.end]
                if isinstance(layer, Affine) and layer.weight not in self.sent:
                    raise UnsupportedModelError(
                        f"The sum {block.name!r} cannot be separated: the weight of {layer.name!r}, whose gradient "
                        "would give this summand, is frozen. Attack by gradient matching."
                    )

    def _start(self) -> tuple[int, str]:
        """The lowest linear layer with a bias: its input follows from its own gradient, so nothing above it matters."""
        for index in self.chain.affine_indices:
            layer = self.chain.steps[index]
            assert isinstance(layer, Affine)
            sent = layer.weight in self.sent and layer.bias in self.sent
            if layer.kind == "Linear" and sent and bool(self.sent[str(layer.bias)].any()):
                return index, "bias"
        last = self.last
        subject = f"R-GAP cannot start at the last layer, {last.name!r} ({last.kind}):"
        if last.kind != "Linear":
            raise UnsupportedModelError(
                f"{subject} the loss's derivative by each output does not follow from the gradient of a "
                "convolution. End the model with Flatten and Linear, or attack by gradient matching."
            )
        if last.weight not in self.sent:
            raise UnsupportedModelError(
                f"{subject} its weight is frozen, so no gradient of it is sent. Attack by gradient matching."
            )
        if not bool(self.sent[last.weight].any()):
            raise InputError(f"The sent gradient of {last.weight!r} is zero: nothing about the input follows from it.")
        if last.bias is not None:
            raise UnsupportedModelError(
                f"{subject} its bias is frozen or its gradient zero, and the equations for a layer without a bias do "
                "not hold with one. Attack by gradient matching."
            )
        index = self.chain.affine_indices[-1]
        like = self.parameters[last.weight]
        if last.filters == 1 and logistic_targets(self.top, self.labels, like):
            return index, "logistic"
        label = torch.zeros(1, dtype=torch.int64, device=like.device) if self.labels is None else self.labels
        if last.filters > 1 and is_softmax_cross_entropy(self.top, last.filters, label):
            return index, "softmax"
        if squared_error_targets(self.top, last.filters, self.labels, like):
            return index, "squared"
        raise UnsupportedModelError(
            f"{subject} it has no bias, and the loss is neither the binary logistic loss of one output "
            "(nn.BCEWithLogitsLoss, nn.SoftMarginLoss) nor softmax cross-entropy nor squared error (nn.MSELoss, with "
            "the targets in the outputs' shape), whose equations are known. With a "
            "bias in this layer any loss works; otherwise attack by gradient matching."
        )


def _equals(found: list[Trial]) -> list[Trial]:
    """The candidates that match as well as the best one."""
    lowest = min(trial.loss for trial in found)
    return [trial for trial in found if trial.loss <= 10 * lowest + PERFECT]
