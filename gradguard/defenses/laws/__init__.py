"""Laws in space: where in the message noise goes."""

from gradguard.defenses.laws.base import Law, Shape
from gradguard.defenses.laws.in_range import InRange, PriorDirections, SmallEigenspace
from gradguard.defenses.laws.isotropic import Isotropic
from gradguard.defenses.laws.prior_aware import PriorAware

__all__ = ["InRange", "Isotropic", "Law", "PriorAware", "PriorDirections", "Shape", "SmallEigenspace"]
