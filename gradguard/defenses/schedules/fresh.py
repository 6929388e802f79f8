"""New noise for every message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradguard.defenses.release import Release
from gradguard.defenses.schedules.base import Filter, Schedule
from gradguard.defenses.stream import NoiseStream


@dataclass(frozen=True, kw_only=True)
class Fresh(Schedule):
    """Independent noise in every message: it averages out over rounds that show the same example."""

    stateful: ClassVar[bool] = False

    def start(self, stream: NoiseStream, generator: torch.Generator | None = None) -> Filter:
        """Nothing to remember."""
        return _Fresh(stream, generator)


class _Fresh(Filter):
    def __init__(self, stream: NoiseStream, generator: torch.Generator | None) -> None:
        self.stream, self.generator = stream, generator

    def source(self, release: Release) -> torch.Generator:
        return self.generator if self.generator is not None else self.stream.message(device=release.device)
