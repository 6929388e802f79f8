"""A matching attack under way: which trials still go on, when to look, when to stop, and its state in a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradguard.attacks._matching.progress import Checkpoint
from gradguard.attacks._matching.search import Search
from gradguard.attacks._matching.trials import Trials
from gradguard.threats.observation import Observation

if TYPE_CHECKING:
    from gradguard.attacks._matching.engine import MatchingAttack

#: Evaluations between two looks at how the trials do: each look reads numbers back from the device.
CHECK_EVERY = 10
#: Trials are dropped from the batch once they are no more than this share of it.
SHRINK_BELOW = 0.75
#: Trials that advance together on a CPU, at least: beside one of a small model, some more cost next to nothing.
FEWEST_AT_ONCE = 4
#: How often a trial that met nothing finite starts anew.
MAX_RESTARTS = 5
#: Seconds between two writes of a checkpoint.
CHECKPOINT_SECONDS = 10.0
#: What a checkpoint holds beside the search's own state.
STATE = ("points", "values", "rows", "waiting", "spent", "attempts")

#: What an objective is brought down to where a polish cannot follow (steps of a defense that are not smooth).
UNPOLISHED = 1e-12


class MatchingRun:
    """A search under way: all trials' best points, and the state of those that are still going.

    `rows`: the trials that advance; `waiting`: those that have not begun, in their order. Trials begin as others end,
    unless their picture has been found by then. `spent`: evaluations of each trial.
    """

    def __init__(
        self,
        attack: MatchingAttack,
        trials: Trials,
        observations: Sequence[Observation],
        generator: torch.Generator | None,
    ) -> None:
        self.attack, self.trials, self.generator = attack, trials, generator
        self.observation = observations[0]
        self.points = torch.cat([self._start(attack.restarts) for _ in observations])
        self.values = torch.full_like(self.points[:, 0], float("inf"))
        self.attempts = torch.zeros(len(self.points), dtype=torch.int64, device=self.points.device)
        # Every picture's first trial, then every picture's second, and so on.
        order = torch.arange(len(self.points), device=self.points.device)
        order = order.unflatten(0, (-1, attack.restarts)).T.flatten()
        self.coupled = any(penalty.couples for penalty in trials.penalties)
        self.at_once = len(order) if self.coupled else min(attack.at_once or self._default_at_once(), len(order))
        self.rows, self.waiting = order[: self.at_once].sort().values, order[self.at_once :]
        self.spent = torch.zeros_like(self.attempts)
        self.state = self._search(self.rows)
        self.tick, self.restarted, self.stopped = 0, 0, "budget"
        self.checkpoint: Checkpoint | None = None

    @property
    def goal(self) -> float:
        """An objective that counts as matched: the attack's, or less where no polish can follow."""
        declared = self.trials.declared
        return self.attack.target if declared is None or declared.polishes else min(self.attack.target, UNPOLISHED)

    def _default_at_once(self) -> int:
        """All, but where trials take each other's time, and a match spares a picture's others."""
        trials = self.trials
        if self.points.device.type != "cpu" or self.goal <= 0:
            return len(self.points)
        return max(len(self.points) // trials.restarts, FEWEST_AT_ONCE)

    def _search(self, rows: Tensor) -> Search:
        """The search of the trials `rows` from their starts."""
        project = self._box if self.attack.boxed and self.trials.value_range is not None else None
        return self.attack.optimiser.search(self.points[rows], target=self.goal, project=project)

    def _start(self, count: int) -> Tensor:
        """`count` first points, label logits drawn after the inputs."""
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        inputs = self.attack.start((count, *self.trials.shape), self.observation, self.generator).flatten(1)
        if self.trials.label_mode == "given":
            return inputs
        logits = torch.randn(
            (count, *self.trials.logits_shape), generator=self.generator, dtype=torch.float64, device=device
        )
        return torch.cat([inputs, logits.flatten(1).to(inputs)], dim=1)

    def _box(self, points: Tensor) -> Tensor:
        low, high = self.trials.value_range or (-float("inf"), float("inf"))
        size = self.trials.size
        return torch.cat([points[:, :size].clamp(low, high), points[:, size:]], dim=1)

    # ------------------------------------------------------------------ the loop

    def search(self, bar: Any) -> None:
        """Advance until there is nothing left to gain, or to spend."""
        attack, began = self.attack, time.perf_counter()
        limit = attack.optimiser.evaluations
        while True:
            # Trials that began later have more left: the look at which the first is spent must not be missed.
            left = limit - int(self.spent[self.rows].max())
            count = min(left, CHECK_EVERY - self.tick % CHECK_EVERY)
            for _ in range(count):
                self.state.advance(lambda points: self.trials.value_and_gradient(points, self.rows))
            self.tick += count
            self.spent[self.rows] += count
            bar(self.tick, self.state.value)
            self._begin_broken_anew()
            if not self._drop_what_has_ended(limit):
                break
            now = time.perf_counter()
            if self.checkpoint is not None and self.checkpoint.due(CHECKPOINT_SECONDS):
                self.save()
            if attack.max_seconds is not None and now - began > attack.max_seconds:
                self.stopped = "time"
                break
        self._keep()
        if self.checkpoint is not None and self.stopped == "budget":
            self.save()  # what follows, the polish, may be interrupted too

    def _keep(self) -> None:
        self.points[self.rows], self.values[self.rows] = self.state.point, self.state.value

    def _begin_broken_anew(self) -> None:
        """Trials that met nothing finite get another start, a few times."""
        broken = self.state.broken & ~torch.isfinite(self.state.value) & (self.attempts[self.rows] < MAX_RESTARTS)
        count = int(broken.sum())
        if count:
            start = self.state.point.clone()
            start[broken] = self._start(count).to(start)
            self.state.begin(broken, start)
            self.attempts[self.rows[broken]] += 1
            self.restarted += count

    def _drop_what_has_ended(self, limit: int) -> bool:
        """Put aside trials that ended, and those of pictures that have been found; begin others in their place.

        Whether any is left.
        """
        picture = self.trials.picture
        self._keep()
        matched = torch.zeros_like(picture).index_add(0, picture, (self.values <= self.goal).long()) > 0
        self.waiting = self.waiting[~matched[picture[self.waiting]]]
        spent = self.spent[self.rows] >= limit
        over = self.state.ended | spent | matched[picture[self.rows]]
        left = int((~over).sum())
        if not left and not len(self.waiting):
            found = bool(matched[picture].all())
            self.stopped = "matched" if found else "budget" if bool((spent & ~self.state.ended).any()) else "ended"
            return False
        crowded = left <= SHRINK_BELOW * len(over) or len(self.waiting) > 0 or bool(spent.any())
        if crowded and left < len(over) and not self.coupled:
            going = torch.nonzero(~over).flatten()
            self.rows = self.rows[going]
            self.state.select(going)
            following, self.waiting = self.waiting.tensor_split([self.at_once - left])
            if len(following):
                self.rows = torch.cat([self.rows, following])
                self.state.extend(self._search(following))
        return True

    # ------------------------------------------------------------------ to a file and back

    def save(self) -> None:
        """Write the state."""
        assert self.checkpoint is not None, "asked only where there is a file"
        tensors = {f"search.{n}": t for n, t in self.state.tensors().items()}
        tensors |= {n: getattr(self, n) for n in STATE}
        if self.generator is not None:
            tensors["generator"] = self.generator.get_state()
        self.checkpoint.save(tensors, {"tick": self.tick, "restarted": self.restarted})

    def resume(self) -> None:
        """Go on from the file, if there is one."""
        assert self.checkpoint is not None, "asked only where there is a file"
        found = self.checkpoint.load()
        if found is None:
            return
        tensors, numbers = found
        for name in STATE:
            setattr(self, name, tensors[name].to(getattr(self, name)))
        self.state.load({n.removeprefix("search."): t for n, t in tensors.items() if n.startswith("search.")})
        if self.generator is not None and "generator" in tensors:
            self.generator.set_state(tensors["generator"].cpu())
        self.tick, self.restarted = numbers["tick"], numbers["restarted"]
