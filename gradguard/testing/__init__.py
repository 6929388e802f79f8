"""Contracts that every layer, attack and defense is given to."""

from gradguard.testing.attacks import check_attack
from gradguard.testing.defenses import check_defense
from gradguard.testing.layers import check_layer
from gradguard.testing.options import check_options
from gradguard.testing.unchanged import unchanged

__all__ = ["check_attack", "check_defense", "check_layer", "check_options", "unchanged"]
