"""Magnitude pruning, at the path where it was before it had neighbours: see `gradguard.defenses.transforms`."""

from gradguard.defenses.transforms.pruning import Pruning

__all__ = ["Pruning"]
