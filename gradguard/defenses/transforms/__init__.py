"""Transforms: pruning, signs, rounding. They draw nothing secret that hides anything, and declare what is left."""

from gradguard.defenses.transforms.base import Transformation
from gradguard.defenses.transforms.pruning import Pruning, RandomPruning, TopK
from gradguard.defenses.transforms.rounding import Quantisation, Sign
from gradguard.defenses.transforms.soteria import Soteria

__all__ = ["Pruning", "Quantisation", "RandomPruning", "Sign", "Soteria", "TopK", "Transformation"]
