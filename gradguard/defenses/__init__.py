"""Defenses: what to add to a gradient so that it gives away less."""

from gradguard.defenses.base import Defense
from gradguard.defenses.directional import DirectionalNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.pruning import Pruning
from gradguard.defenses.registry import DEFENSES, DefenseEntry, register_defense

__all__ = [
    "DEFENSES",
    "Defense",
    "DefenseEntry",
    "DirectionalNoise",
    "GaussianNoise",
    "PriorNoise",
    "Pruning",
    "SmallEigenspaceNoise",
    "register_defense",
]
