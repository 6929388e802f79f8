"""Levenberg-Marquardt as an attack of its own: no first-order search before it."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.attacks._matching.engine import MatchingAttack
from gradguard.attacks._matching.lbfgs import LBFGS
from gradguard.attacks._matching.search import Optimiser
from gradguard.attacks._options import check_whole
from gradguard.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(MatchingAttack):
    """Minimise the squared distance of gradients by damped Gauss-Newton steps from the start on (ours).

    For smooth networks.

    Args:
        iterations: Steps, at least 1, each a least-squares problem in the input Jacobian
            (`matching.levenberg_marquardt`). It replaces `polish`, which is the same thing after another search.

    Raises:
        InputError: If `iterations` is below 1, or `polish` is given.
    """

    iterations: int = 100

    def __post_init__(self) -> None:
        check_whole(1, iterations=self.iterations)
        if self.polish not in (0, self.iterations):
            raise InputError("This attack is a polish from the start on: give `iterations`, and leave `polish` out.")
        object.__setattr__(self, "polish", self.iterations)
        super().__post_init__()

    @property
    def optimiser(self) -> Optimiser:
        """None: the starts are evaluated, and left where they are."""
        return LBFGS(evaluations=1, memory=1)
