"""What an attacker knows about inputs beside the gradient, as penalties on trials: smoothness, size, statistics.

All take the trials' inputs `(T, B, *input_shape)` and give one number per trial, `(T,)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gradguard.attacks._options import check_numbers
from gradguard.errors import InputError
from gradguard.linalg.covariances import PowerLawPrior

if TYPE_CHECKING:
    from gradguard.attacks._matching.trials import Trials


@dataclass(frozen=True, kw_only=True)
class Penalty(ABC):
    """`weight` times something that is small for inputs as they ought to be. A subclass defines `of`.

    `couples`: whether a trial's penalty depends on the other trials of its picture.

    Args:
        weight: Not negative and finite; relative to the matching loss.

    Raises:
        InputError: If `weight` is outside its range.
    """

    weight: float
    couples: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(weight=self.weight)
        if not 0 <= self.weight < float("inf"):
            raise InputError(f"A penalty's `weight` must be finite and not negative, got {self.weight}.")

    def __call__(self, inputs: Tensor, trials: Trials) -> Tensor:
        """The weighted penalty, differentiable.

        Args:
            inputs: The trials' inputs, shape `(T, B, *input_shape)`.
            trials: What is known about the trials.

        Returns:
            Shape `(T,)`.
        """
        return self.weight * self.of(inputs, trials)

    @abstractmethod
    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """The penalty at weight 1.

        Args:
            inputs: The trials' inputs, shape `(T, B, *input_shape)`.
            trials: What is known about the trials.

        Returns:
            Shape `(T,)`.
        """

    def check(self, trials: Trials) -> None:
        """Refuse trials of which this penalty cannot be computed.

        Args:
            trials: What is known about the trials.

        Raises:
            InputError: If it cannot be computed.
        """


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Penalty):
    """The mean absolute difference of neighbouring pixels, down plus across (Geiping et al. 2020); 0 if no pictures.

    Args:
        weight: As in `Penalty`.
    """

    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """`(T,)`, in input units."""
        return total_variation(inputs)


def total_variation(inputs: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, down plus across, over a trial's pictures.

    Args:
        inputs: Shape `(T, B, channels, height, width)`; with fewer dimensions they are not pictures.

    Returns:
        Shape `(T,)`, input units; 0 for inputs that are not pictures.
    """
    if inputs.ndim < 5:
        return inputs.new_zeros(len(inputs))
    down, across = inputs.diff(dim=-2), inputs.diff(dim=-1)
    return down.abs().flatten(1).mean(1) + across.abs().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class SquaredNorm(Penalty):
    """The mean square of the inputs' elements (GradInversion's image prior, Yin et al. 2021, Eq. 5).

    Args:
        weight: As in `Penalty`.
    """

    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """`(T,)`."""
        return inputs.square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class GaussianPrior(Penalty):
    """`(x - mean)^T C^{-1} (x - mean) / D`, `C` the covariance of pictures: with a Mahalanobis distance, MAP.

    Args:
        weight: As in `Penalty`.
        prior: The covariance `C`.
        mean: Of an element. Default: the middle of the value range, 0 if that is not known.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)
    mean: float | None = None

    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """`(T,)`, about 1 for a picture drawn from the prior, averaged over the batch."""
        mean = self.mean
        if mean is None:
            mean = sum(trials.value_range) / 2 if trials.value_range is not None else 0.0
        white = self.prior.inverse_sqrt((inputs - mean).flatten(0, 1))
        return white.square().reshape(len(inputs), -1).mean(1)


@dataclass(frozen=True, kw_only=True)
class BatchNormStatistics(Penalty):
    """How far each BatchNorm's inputs are from its running statistics (GradInversion, Yin et al. 2021, Eq. 7).

    `sum_l |mean_l - running_mean_l| + |variance_l - running_variance_l|` over the trial's batch.

    Args:
        weight: As in `Penalty`.
        first: How many times the first layer counts.
    """

    first: float = 10.0

    def check(self, trials: Trials) -> None:
        """There must be a BatchNorm with running statistics."""
        if not _batch_norms(trials):
            raise InputError(
                f"{type(trials.function.model).__name__} has no BatchNorm with running statistics: leave "
                "`BatchNormStatistics` out."
            )

    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """`(T,)`."""
        seen: list[tuple[_BatchNorm, Tensor]] = []

        def record(module: Any, arguments: tuple[Tensor, ...]) -> None:
            seen.append((module, arguments[0]))

        handles = [module.register_forward_pre_hook(record) for module in _batch_norms(trials)]
        try:
            trials.function.outputs(trials.parameters, inputs.flatten(0, 1))
        finally:
            for handle in handles:
                handle.remove()
        total = inputs.new_zeros(len(inputs))
        for position, (module, x) in enumerate(seen):
            assert module.running_mean is not None, "only those with running statistics are looked at"
            assert module.running_var is not None
            values = x.unflatten(0, inputs.shape[:2]).movedim(2, 1).flatten(2)  # (T, channels, examples and pixels)
            mean = values.mean(2) - module.running_mean.to(values)
            variance = values.var(2, correction=0) - module.running_var.to(values)
            factor = self.first if position == 0 else 1.0
            total = total + factor * (_length(mean) + _length(variance))
        return total


def _batch_norms(trials: Trials) -> list[_BatchNorm]:
    modules = trials.function.model.modules()
    return [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _length(rows: Tensor) -> Tensor:
    """Norms of rows, with a derivative (0) at 0."""
    square = rows.square().sum(1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)


@dataclass(frozen=True, kw_only=True)
class GroupConsistency(Penalty):
    """The mean squared distance to the mean of the same picture's trials (GradInversion, Yin et al. 2021, Eq. 11).

    Differs from the paper in: the mean is taken as it is, without registering the trials first.

    Args:
        weight: As in `Penalty`.
    """

    couples: ClassVar[bool] = True

    def of(self, inputs: Tensor, trials: Trials) -> Tensor:
        """`(T,)`."""
        grouped = inputs.unflatten(0, (-1, trials.restarts))
        mean = grouped.detach().mean(1, keepdim=True)
        return (grouped - mean).square().flatten(2).mean(2).flatten()
