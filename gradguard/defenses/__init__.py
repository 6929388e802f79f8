"""Defenses: what to add to a gradient so that it gives away less."""

from gradguard.defenses.base import Defense
from gradguard.defenses.directional import DirectionalNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.pruning import Pruning

__all__ = ["Defense", "DirectionalNoise", "GaussianNoise", "PriorNoise", "Pruning", "SmallEigenspaceNoise"]
