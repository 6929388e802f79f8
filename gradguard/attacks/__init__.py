"""Attacks: what a gradient gives away, proven."""

from gradguard.attacks._matching.engine import GradientMatching, MatchingAttack
from gradguard.attacks.adaptive import MAP, WienerFilter, adaptive_attacks
from gradguard.attacks.base import Attack, attack_candidates
from gradguard.attacks.dlg import DLG, IDLG
from gradguard.attacks.grad_inversion import GradInversion
from gradguard.attacks.hgap import HGAP
from gradguard.attacks.ilrg import ILRG, IDLGLabel, LabelSystem
from gradguard.attacks.inverting_gradients import InvertingGradients
from gradguard.attacks.registry import ATTACKS, AttackEntry, register_attack
from gradguard.attacks.rgap import RGAP
from gradguard.attacks.second_order import LevenbergMarquardt
from gradguard.attacks.spear import SPEAR
from gradguard.threats.observation import Observation, Reconstruction

__all__ = [
    "ATTACKS",
    "DLG",
    "HGAP",
    "IDLG",
    "ILRG",
    "MAP",
    "RGAP",
    "SPEAR",
    "Attack",
    "AttackEntry",
    "GradInversion",
    "GradientMatching",
    "IDLGLabel",
    "InvertingGradients",
    "LabelSystem",
    "LevenbergMarquardt",
    "MatchingAttack",
    "Observation",
    "Reconstruction",
    "WienerFilter",
    "adaptive_attacks",
    "attack_candidates",
    "register_attack",
]
