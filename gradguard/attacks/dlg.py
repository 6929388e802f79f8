"""Deep leakage from gradients, and iDLG's shortcut to the label."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.attacks._matching.engine import MatchingAttack, UnknownLabels
from gradguard.attacks._matching.lbfgs import LBFGS
from gradguard.attacks._matching.search import Optimiser


@dataclass(frozen=True, kw_only=True)
class DLG(MatchingAttack):
    """Zhu, Liu & Han 2019, "Deep leakage from gradients": match the gradient in squared distance by L-BFGS.

    Differs from the paper in: a Wolfe line search, `restarts` trials side by side, float64, and a second-order polish
    (`polish=0` leaves it out).

    Args:
        evaluations: Gradient evaluations of all trials, at least 1.
        memory: Pairs that L-BFGS keeps per trial.
        polish: Steps of the second-order polish at most.
        labels: What is done about unknown labels: "joint" optimises them beside the inputs, as in the paper. This and
            the other options are those of the matching engine.
    """

    evaluations: int = 300
    memory: int = 20
    polish: int = 50
    labels: UnknownLabels = "joint"

    @property
    def optimiser(self) -> Optimiser:
        """L-BFGS."""
        return LBFGS(evaluations=self.evaluations, memory=self.memory)

    @property
    def target(self) -> float:
        """Where the polish takes over, once the basin is found; without one, all that float64 gives."""
        return 1e-6 if self.polish else 1e-24


@dataclass(frozen=True, kw_only=True)
class IDLG(DLG):
    """Zhao, Mopuri & Bilen 2020, "iDLG": the label from the last layer's signs, then DLG on the inputs alone.

    Args:
        labels: "inferred", from the last layer. The other options are those of `DLG`.
    """

    labels: UnknownLabels = "inferred"
