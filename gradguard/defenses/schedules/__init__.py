"""Schedules over rounds: how the noise of one message hangs together with that of the others."""

from gradguard.defenses.schedules.base import Filter, Schedule
from gradguard.defenses.schedules.correlated import Correlated, Lambda, SquareRoot, TwoBuffers
from gradguard.defenses.schedules.fresh import Fresh

__all__ = ["Correlated", "Filter", "Fresh", "Lambda", "Schedule", "SquareRoot", "TwoBuffers"]
