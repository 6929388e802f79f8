"""Inverting Gradients: the direction of the gradient, a smooth picture, and steps by sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradguard.attacks._matching.adam import Adam
from gradguard.attacks._matching.distances import CosineDistance, Distance
from gradguard.attacks._matching.engine import MatchingAttack
from gradguard.attacks._matching.penalties import Penalty, TotalVariation
from gradguard.attacks._matching.search import Optimiser


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(MatchingAttack):
    """Geiping et al. 2020, "Inverting gradients - how easy is it to break privacy in federated learning?"

    Minimises `1 - cosine + total_variation * TV` by Adam on the sign of the derivative, inputs kept in the
    observation's value range.

    `learning_rate` and `total_variation` are in units of inputs. The numbers are the authors', who count in normalised
    inputs; their own steps in [0, 1] are a standard deviation (about 1/4) times as long and their total variation
    weighs 4 times as much: `learning_rate=0.025, total_variation=4e-4` (docs/matching.md compares the
    two on one network).

    Args:
        iterations: Steps of Adam.
        learning_rate: Of Adam; falls tenfold at 3/8, 5/8 and 7/8 of the `iterations`.
        total_variation: Weight of that penalty; 0 leaves it out.
        restarts: Trials per picture.
        boxed: Keep inputs in the observation's value range.
        dtype: What the search computes in. The other options are those of the matching engine.
    """

    iterations: int = 4800
    learning_rate: float = 0.1
    total_variation: float = 1e-4
    restarts: int = 1
    boxed: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def optimiser(self) -> Optimiser:
        """Adam on signs."""
        return Adam(iterations=self.iterations, learning_rate=self.learning_rate)

    @property
    def distance(self) -> Distance:
        """Of directions (Geiping et al. 2020, Eq. 4)."""
        return CosineDistance()

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """Smooth pictures."""
        return (TotalVariation(weight=self.total_variation),)
