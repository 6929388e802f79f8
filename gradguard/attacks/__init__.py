"""Attacks: what a gradient gives away, proven."""

from gradguard.attacks.base import Attack, Observation, Reconstruction
from gradguard.attacks.dlg import DLG, IDLG
from gradguard.attacks.hgap import HGAP
from gradguard.attacks.ilrg import ILRG, IDLGLabel
from gradguard.attacks.inverting_gradients import InvertingGradients
from gradguard.attacks.matching import MatchingAttack
from gradguard.attacks.rgap import RGAP

__all__ = [
    "DLG",
    "HGAP",
    "IDLG",
    "ILRG",
    "RGAP",
    "Attack",
    "IDLGLabel",
    "InvertingGradients",
    "MatchingAttack",
    "Observation",
    "Reconstruction",
]
