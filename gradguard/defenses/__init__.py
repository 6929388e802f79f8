"""Defenses: what to add to a gradient so that it gives away less."""

from gradguard.defenses.base import Defense, randn
from gradguard.defenses.directional import DirectionalNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.pruning import Pruning
from gradguard.defenses.registry import DEFENSES, DefenseEntry, register_defense
from gradguard.defenses.stream import MessageNoise, NoiseStream, noise_key

__all__ = [
    "DEFENSES",
    "Defense",
    "DefenseEntry",
    "DirectionalNoise",
    "GaussianNoise",
    "MessageNoise",
    "NoiseStream",
    "PriorNoise",
    "Pruning",
    "SmallEigenspaceNoise",
    "noise_key",
    "randn",
    "register_defense",
]
