"""Gradient matching: look for inputs whose gradient is the one that was sent.

One engine for DLG and its descendants. Restarts and pictures are a batch dimension: `T` trials advance together, each
with its own state, until a trial of every picture matches, all have ended, or the budget is spent. Of each picture's
trials the one with the lowest matching loss is kept. The truth is never looked at.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradguard.attacks._labels.classification_head import observed_head
from gradguard.attacks._labels.inference import infer_labels
from gradguard.attacks._matching.declared import weighed_variance
from gradguard.attacks._matching.distances import Distance, MahalanobisDistance, SquaredDistance
from gradguard.attacks._matching.lbfgs import LBFGS
from gradguard.attacks._matching.levenberg_marquardt import levenberg_marquardt
from gradguard.attacks._matching.penalties import Penalty
from gradguard.attacks._matching.progress import Checkpoint, progress_bar
from gradguard.attacks._matching.run import MatchingRun
from gradguard.attacks._matching.search import Optimiser, rows_where
from gradguard.attacks._matching.trials import LabelMode, Trials, check_alike
from gradguard.attacks._options import check_numbers, check_whole
from gradguard.attacks.base import Attack, check_generator, failures_of
from gradguard.errors import InputError
from gradguard.functional.precision import full_precision
from gradguard.functional.structures import Rest, map_rest, rows_of, stacked
from gradguard.threats.observation import Observation, Reconstruction

#: How labels that the observation lacks are dealt with.
UnknownLabels = Literal["inferred", "joint", "shared"]


#: A matching loss after which no other trial of a picture is polished: rounding to float32 leaves 1e-14 or so.
FOUND = 1e-10


@dataclass(frozen=True, kw_only=True)
class MatchingAttack(Attack):
    """The frame: start `restarts` trials per picture, minimise `distance` and `penalties`, polish, keep the best.

    `restarts`: trials of each picture. `polish`: Levenberg-Marquardt iterations on every trial afterwards; on smooth
        networks they take a found picture to the precision of the arithmetic.
    `labels`: those of the observation are used; where it has none, "inferred" takes them from the last layer first
        (iDLG for one example; for more iLRG and, where it does not explain the gradient, what goes past it), "joint"
        optimises class probabilities for each example beside the inputs, "shared" one vector of them for the whole
        batch (the baseline of the iLRG paper). The last two need a loss that takes probabilities, as cross-entropy
        does, and `num_classes`.
    `boxed`: inputs are kept in the observation's value range. `start_from`: standard normal numbers ("normal"), in
        units of a quarter of the value range around its middle where inputs are boxed; uniform ones in the range
        ("uniform"); or its middle ("grey").
    `max_seconds`: wall clock, looked at between evaluations; what was found until then is returned.
    `at_once`: trials that advance together, at most; the next begin as others end, and none of a picture that has been
        found (default: all on a GPU, and where no objective counts as matched; else as many as pictures, and four at
        least: on a CPU trials take each other's time).
    `chunk_size`: trials per gradient evaluation, a bound on memory. `dtype`: what the search computes in; the polish is
        in float64 (where the device has it).
    `adaptive`: use what the observation's `knowledge` declares of the defense: elements and parameters that say nothing
        are not matched, steps are taken with the trial gradients too, an unknown factor is solved for, noise of unequal
        variance is weighed. `gradguard.attacks.adaptive` turns it on where there is something to use.

    `details`: `evaluations` of each trial at most, `trial_losses` (relative squared matching loss, infinite for trials
    that did not begin), `trial` (which was kept), `restarted` (trials that met nothing finite and started anew),
    `stopped` ("matched", "ended", "budget" or "time"), and `polish_iterations`.
    """

    takes_local_training: ClassVar[bool] = True
    takes_structures: ClassVar[bool] = True
    takes_missing_gradients: ClassVar[bool] = True
    takes_free_scale: ClassVar[bool] = True

    restarts: int = 4
    polish: int = 0
    labels: UnknownLabels = "inferred"
    boxed: bool = False
    start_from: Literal["normal", "uniform", "grey"] = "normal"
    max_seconds: float | None = None
    at_once: int | None = None
    chunk_size: int | None = None
    dtype: torch.dtype = torch.float64
    adaptive: bool = False

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return f"{type(self).__name__}, adaptive" if self.adaptive else type(self).__name__

    def __post_init__(self) -> None:
        check_whole(1, restarts=self.restarts)
        check_whole(0, polish=self.polish)
        if self.labels not in ("inferred", "joint", "shared"):
            raise InputError(f'`labels` must be "inferred", "joint" or "shared", got {self.labels!r}.')
        if self.start_from not in ("normal", "uniform", "grey"):
            raise InputError(f'`start_from` must be "normal", "uniform" or "grey", got {self.start_from!r}.')
        for name in ("max_seconds", "at_once", "chunk_size"):
            value = getattr(self, name)
            if value is None:
                continue
            check_numbers(**{name: value})
            if name != "max_seconds" and value > 0:
                check_whole(1, **{name: value})
            if not value > 0:
                raise InputError(f"`{name}` must be positive or None, got {value}.")
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(f"`dtype` must be torch.float32 or torch.float64 to search in, got {self.dtype}.")
        _ = self.optimiser, self.distance, self.penalties  # their options are checked now, not when they are used

    # ------------------------------------------------------------------ what a variant chooses

    @property
    @abstractmethod
    def optimiser(self) -> Optimiser:
        """How it minimises."""

    @property
    def distance(self) -> Distance:
        """Between gradients: what it minimises."""
        return SquaredDistance()

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """On inputs, added to the distance."""
        return ()

    @property
    def target(self) -> float:
        """A trial whose objective is at most this has matched; the other trials of its picture have then lost."""
        return 0.0

    def has_converged(self, loss: float) -> bool:
        """Whether a relative squared matching loss counts as a match; noise on the gradient makes that impossible."""
        return loss < 1e-6

    def start(self, shape: tuple[int, ...], observation: Observation, generator: torch.Generator | None) -> Tensor:
        """The first inputs of trials: `shape` is `(trials, B, *input_shape)`."""
        device = generator.device if generator is not None else torch.device("cpu")
        low, high = observation.value_range or (-1.0, 1.0)
        middle, quarter = (low + high) / 2, (high - low) / 4
        if self.start_from == "grey":
            start = torch.full(shape, middle, dtype=torch.float64)
        elif self.start_from == "uniform":
            start = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        else:
            start = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            if self.boxed and observation.value_range is not None:
                start = middle + quarter * start
        return start.to(observation.loss_gradient.device, self.dtype)

    # ------------------------------------------------------------------ the attack

    def check(self, observation: Observation) -> None:
        """Labels that are variables need a number of classes; those to be inferred the head; and all a gradient."""
        if not any(bool(g.any()) for g in observation.sent.values()):
            raise InputError("The sent gradient is zero everywhere: nothing about the inputs follows from it.")
        if observation.labels is None and self.labels != "inferred" and observation.num_classes is None:
            raise InputError(
                f"{self.name} with unknown labels optimises class probabilities and needs `num_classes` in the "
                "observation; give it, or the labels themselves."
            )
        # Refuses what does not fit the model.
        Trials([observation], distance=self.distance, penalties=self.penalties, adaptive=self.adaptive)
        if observation.labels is None and observation.loss_gradient.is_bound:
            raise InputError(
                f"{self.name} needs the labels and the known inputs where inputs or targets are structures: give the "
                "observation's `labels`, as `LossGradient.bind` returns them."
            )
        if observation.labels is None and self.labels == "inferred":
            observed_head(observation, needs_bias=False)
        if observation.local is not None and self.polish:
            raise InputError(
                f"{self.name}'s polish needs the gradient of a single step, and this client took "
                f"{observation.local.steps}: pass `polish=0`."
            )

    def __call__(
        self,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Reconstruction:
        """Attack. `progress`: show a bar. `checkpoint`: a file for the search's state, for the owner's eyes.

        It is written every few seconds; the same call goes on from there and ends as it would have without a break. It
        is removed at the end. The rest as in `Attack`.
        """
        return self.attack_all([observation], generator=generator, progress=progress, checkpoint=checkpoint)[0]

    @full_precision()
    def attack_all(
        self,
        observations: Sequence[Observation],
        *,
        generator: torch.Generator | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> list[Reconstruction]:
        """Attack several gradients of one model at once: all trials of all of them advance together.

        `observations`: of one kind (model, shapes, what is known). Starts are drawn for one after the other, so each
        begins as it would alone. `seconds` of a result are those of all together over their number.
        """
        check_generator(generator)
        check_alike(observations)
        for observation in observations:
            self.check_all(observation)
        began = time.perf_counter()
        with failures_of(self, observations[0]):
            unscaled = [o.at_unit_scale() for o in observations]
            results = self._run(unscaled, generator, progress, checkpoint)
            seconds = (time.perf_counter() - began) / len(observations)
            return [self.finished(o, r, seconds) for o, r in zip(observations, results, strict=True)]

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """One observation's trials."""
        return self._run([observation], generator, False, None)[0]

    def _run(
        self,
        observations: Sequence[Observation],
        generator: torch.Generator | None,
        progress: bool,
        checkpoint: str | Path | None,
    ) -> list[Reconstruction]:
        observations = [o.in_dtype(self.dtype) for o in observations]
        trials = self.trials(observations)
        run = MatchingRun(self, trials, observations, generator)
        if checkpoint is not None:
            run.checkpoint = Checkpoint(Path(checkpoint), self, trials)
            run.resume()
        rounds = math.ceil(len(run.points) / run.at_once)
        with progress_bar(self.name, rounds * self.optimiser.evaluations, progress) as bar:
            run.search(bar)
        results = self._results(run, observations)
        if run.checkpoint is not None:
            run.checkpoint.remove()
        return results

    def trials(self, observations: Sequence[Observation]) -> Trials:
        """The problem: what is held fixed, what is looked for, what is minimised."""
        mode: LabelMode = "given"
        labels = None
        if observations[0].labels is None and self.labels != "inferred":
            mode = self.labels
        else:
            function = observations[0].loss_gradient
            labels = stacked([function.cast(self.labels_for(o)) for o in observations])
        return Trials(
            observations,
            restarts=self.restarts,
            labels=labels,
            label_mode=mode,
            distance=self._distance_for(observations[0]),
            penalties=self.penalties,
            chunk_size=self.chunk_size,
            adaptive=self.adaptive,
        )

    def _distance_for(self, observation: Observation) -> Distance:
        """The attack's own, or for noise that is declared to differ over elements, the one that weighs it."""
        if not self.adaptive or not isinstance(self.distance, SquaredDistance):
            return self.distance
        variance = weighed_variance(observation)
        return self.distance if variance is None else MahalanobisDistance(variance=variance)

    def labels_for(self, observation: Observation) -> Rest:
        """The labels that the trials are held to: the given ones, or those that the last layer gives away."""
        return observation.labels if observation.labels is not None else infer_labels(observation)

    def _results(self, run: MatchingRun, observations: Sequence[Observation]) -> list[Reconstruction]:
        """Polish, and of each picture keep the trial with the lowest matching loss."""
        trials = run.trials
        rows = torch.arange(len(run.points), device=run.points.device)
        inputs, labels = trials.inputs(run.points), trials.hard_labels(run.points, rows)
        losses = trials.matching_losses(inputs, labels, rows).nan_to_num(nan=float("inf"))
        losses = losses.where(run.spent > 0, float("inf"))
        details: dict[str, Any] = {
            "evaluations": int(run.spent.max()),
            "restarted": run.restarted,
            "stopped": run.stopped,
        }
        if self.polish and (trials.declared is None or trials.declared.polishes):
            inputs, losses, details["polish_iterations"] = self._polished(trials, inputs, labels, losses)
        results = []
        for first in range(0, len(losses), self.restarts):
            trials_of_one = slice(first, first + self.restarts)
            x, y = inputs[trials_of_one], rows_of(labels, trials_of_one)
            values = losses[trials_of_one].tolist()
            best = min(range(len(values)), key=values.__getitem__)
            results.append(
                Reconstruction(
                    attack=self.name,
                    inputs=x[best].detach(),
                    labels=map_rest(Tensor.detach, rows_of(y, best)),
                    converged=values[best] < float("inf") and self.has_converged(values[best]),
                    details=details | {"trial": best, "trial_losses": values},
                )
            )
        return results

    def _polished(self, trials: Trials, inputs: Tensor, labels: Rest, losses: Tensor) -> tuple[Tensor, Tensor, int]:
        """Inputs and losses after Levenberg-Marquardt, in float64: the best trial of each picture first.

        The others follow for the pictures whose best trial does not match then.
        """
        dtype = torch.float32 if inputs.device.type == "mps" else torch.float64
        observation = trials.observation.in_dtype(dtype)
        inputs, losses, iterations = inputs.to(dtype), losses.to(dtype), 0
        grouped = losses.unflatten(0, (-1, self.restarts))
        first = grouped.argmin(1) + torch.arange(len(grouped), device=losses.device) * self.restarts
        rest = torch.ones_like(losses, dtype=torch.bool).index_fill_(0, first, False)
        for rows, enough in ((first, 0.0), (torch.nonzero(rest).flatten(), FOUND)):
            unmatched = losses.unflatten(0, (-1, self.restarts)).amin(1) > enough
            rows = rows[unmatched[trials.picture[rows]] & torch.isfinite(losses[rows])]
            if not len(rows):
                continue
            polished = levenberg_marquardt(
                observation,
                inputs[rows],
                rows_of(labels, rows),
                sent={n: g.to(dtype)[trials.picture[rows]] for n, g in trials.sent.items()},
                groups=trials.picture[rows],
                weights=None if trials.declared is None else trials.declared.weights(trials.picture[rows]),
                iterations=self.polish,
                adaptive=self.adaptive,
            )
            better = polished.values < losses[rows]
            inputs[rows] = rows_where(better, polished.points.reshape(inputs[rows].shape), inputs[rows])
            losses[rows] = torch.where(better, polished.values, losses[rows])
            iterations += polished.evaluations
        return inputs, losses, iterations


@dataclass(frozen=True, kw_only=True)
class GradientMatching(MatchingAttack):
    """The engine with every part to choose: distance, penalties, optimiser.

    `objective`: the distance between gradients. `regularisers`: penalties on inputs. `minimiser`: L-BFGS or Adam.
    `goal`: an objective that counts as matched. The published attacks are this with fixed parts.
    """

    objective: Distance = field(default_factory=SquaredDistance)
    regularisers: tuple[Penalty, ...] = ()
    minimiser: Optimiser = field(default_factory=LBFGS)
    goal: float = 0.0

    @property
    def distance(self) -> Distance:
        """As given."""
        return self.objective

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """As given."""
        return tuple(self.regularisers)

    @property
    def optimiser(self) -> Optimiser:
        """As given."""
        return self.minimiser

    @property
    def target(self) -> float:
        """As given."""
        return self.goal
