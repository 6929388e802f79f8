"""Laws in space: where in the message noise goes."""

from gradguard.defenses.laws.base import Law, Shape
from gradguard.defenses.laws.isotropic import Isotropic

__all__ = ["Isotropic", "Law", "Shape"]
