"""Defenses: what is sent in the place of a gradient so that it gives away less.

`Defense` (options) `.start()` -> `Protector` `.protect(release)` -> `Sent`. `Noise` is a law in space x a schedule over
rounds x a strength; `Compose` puts several steps in a row.
"""

from gradguard.defenses.base import Defense, randn
from gradguard.defenses.claims import Claim, claim
from gradguard.defenses.clipping import ClipPerExample, ClipUpdate
from gradguard.defenses.compose import Compose
from gradguard.defenses.correlated import CorrelatedNoise
from gradguard.defenses.directional import DirectionalNoise, PriorAwareNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.dpsgd import DPSGD
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.laws import Isotropic, Law
from gradguard.defenses.noise import Noise
from gradguard.defenses.protector import Protector
from gradguard.defenses.registry import DEFENSES, DefenseEntry, register_defense
from gradguard.defenses.release import Release, Sent
from gradguard.defenses.schedules import Fresh, Lambda, Schedule, SquareRoot, TwoBuffers
from gradguard.defenses.separation import SeparatedSampler, check_separation
from gradguard.defenses.stream import MessageNoise, NoiseStream, noise_key
from gradguard.defenses.strengths import Epsilon, Floor, NoiseMultiplier, Ratio, Std, Strength
from gradguard.defenses.transforms import Pruning, Quantisation, RandomPruning, Sign, Soteria, TopK

__all__ = [
    "DEFENSES",
    "DPSGD",
    "Claim",
    "ClipPerExample",
    "ClipUpdate",
    "Compose",
    "CorrelatedNoise",
    "Defense",
    "DefenseEntry",
    "DirectionalNoise",
    "Epsilon",
    "Floor",
    "Fresh",
    "GaussianNoise",
    "Isotropic",
    "Lambda",
    "Law",
    "MessageNoise",
    "Noise",
    "NoiseMultiplier",
    "NoiseStream",
    "PriorAwareNoise",
    "PriorNoise",
    "Protector",
    "Pruning",
    "Quantisation",
    "RandomPruning",
    "Ratio",
    "Release",
    "Schedule",
    "Sent",
    "SeparatedSampler",
    "Sign",
    "SmallEigenspaceNoise",
    "Soteria",
    "SquareRoot",
    "Std",
    "Strength",
    "TopK",
    "TwoBuffers",
    "check_separation",
    "claim",
    "noise_key",
    "randn",
    "register_defense",
]
