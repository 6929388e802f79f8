"""Schedules over rounds: how the noise of one message hangs together with that of the others."""

from gradguard.defenses.schedules.base import Filter, Schedule
from gradguard.defenses.schedules.fresh import Fresh

__all__ = ["Filter", "Fresh", "Schedule"]
