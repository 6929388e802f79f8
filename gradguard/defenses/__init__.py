"""Defenses: what is sent in the place of a gradient so that it gives away less.

`Defense` (options) `.start()` -> `Protector` `.protect(release)` -> `Sent`. `Noise` is a law in space x a schedule over
rounds x a strength; `Compose` puts several steps in a row.
"""

from gradguard.defenses.base import Defense, randn
from gradguard.defenses.compose import Compose
from gradguard.defenses.directional import DirectionalNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.laws import Isotropic, Law
from gradguard.defenses.noise import Noise
from gradguard.defenses.protector import Protector
from gradguard.defenses.registry import DEFENSES, DefenseEntry, register_defense
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.schedules import Fresh, Schedule
from gradguard.defenses.stream import MessageNoise, NoiseStream, noise_key
from gradguard.defenses.strengths import NoiseMultiplier, Ratio, Std, Strength
from gradguard.defenses.transforms import Pruning, Quantisation, RandomPruning, Sign, Soteria, TopK

__all__ = [
    "DEFENSES",
    "Compose",
    "Defense",
    "DefenseEntry",
    "DirectionalNoise",
    "Fresh",
    "GaussianNoise",
    "Isotropic",
    "Law",
    "MessageNoise",
    "Noise",
    "NoiseMultiplier",
    "NoiseStream",
    "PriorNoise",
    "Protector",
    "Pruning",
    "Quantisation",
    "RandomPruning",
    "Ratio",
    "Release",
    "Schedule",
    "Sent",
    "Sign",
    "SmallEigenspaceNoise",
    "Soteria",
    "Std",
    "Strength",
    "TopK",
    "noise_key",
    "randn",
    "register_defense",
]
