"""GradInversion: what pictures do to batch normalisation, and trials that agree with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradguard.attacks._matching.adam import Adam
from gradguard.attacks._matching.engine import MatchingAttack
from gradguard.attacks._matching.penalties import (
    BatchNormStatistics,
    GroupConsistency,
    Penalty,
    SquaredNorm,
    TotalVariation,
)
from gradguard.attacks._matching.search import Optimiser


@dataclass(frozen=True, kw_only=True)
class GradInversion(MatchingAttack):
    """Yin et al. 2021, "See through gradients: image batch recovery via GradInversion".

    Squared distance of gradients, total variation, squared norm, BatchNorm statistics and group consistency, by Adam
    with a cosine decay after a warm-up. Differs from the paper in: the squared distance is relative to the sent
    gradient, which is why `batch_norm` is 1e-3 where the paper has 0.1; no noise is added to the steps, the group's
    mean is not registered, and a quarter of the paper's 20,000 iterations are the default.

    Args:
        iterations: Steps of Adam.
        learning_rate: Of Adam, in units of inputs.
        total_variation: Weight of that penalty; 0 leaves it out, as with the following ones.
        squared_norm: Weight of the inputs' mean square (Eq. 5).
        batch_norm: Weight of the BatchNorm statistics (Eq. 7). The model needs a BatchNorm with running statistics.
        group_consistency: Weight of the distance to the mean of a picture's trials (Eq. 11).
        restarts: Trials per picture.
        boxed: Keep inputs in the observation's value range.
        dtype: What the search computes in. The other options are those of the matching engine.
    """

    iterations: int = 5000
    learning_rate: float = 0.1
    total_variation: float = 1e-4
    squared_norm: float = 1e-6
    batch_norm: float = 1e-3
    group_consistency: float = 1e-2
    restarts: int = 4
    boxed: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def optimiser(self) -> Optimiser:
        """Adam."""
        return Adam(iterations=self.iterations, learning_rate=self.learning_rate, sign=None, decay="cosine", warm_up=50)

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """Those with a positive weight."""
        parts: tuple[Penalty, ...] = (
            TotalVariation(weight=self.total_variation),
            SquaredNorm(weight=self.squared_norm),
            BatchNormStatistics(weight=self.batch_norm),
            GroupConsistency(weight=self.group_consistency),
        )
        return tuple(part for part in parts if part.weight > 0)
