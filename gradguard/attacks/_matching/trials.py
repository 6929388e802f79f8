"""The trials of a matching attack: all pictures' restarts as one batch of problems.

Letters: `N` pictures (observations) under one model, `T` trials, `restarts` of them for each picture in turn.
A trial's variables are one row: its inputs `(B, *input_shape)`, and behind them, where labels are sought beside
inputs, their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

from gradguard.attacks._matching.declared import Declared, matched_names
from gradguard.attacks._matching.distances import Distance, MahalanobisDistance, SquaredDistance
from gradguard.attacks._matching.penalties import Penalty
from gradguard.errors import InputError
from gradguard.functional.choice import way_of
from gradguard.functional.precision import full_precision
from gradguard.functional.problems import Problems
from gradguard.functional.structures import Rest, map_rest, rows_of
from gradguard.functional.vectors import Gradient
from gradguard.functional.ways import failures_named
from gradguard.threats.observation import Observation

#: Labels that are held fixed, one distribution per example beside its inputs, or one for the whole batch.
LabelMode = Literal["given", "joint", "shared"]
#: From a change of the gradients, `(T, *parameter_shape)` each, to that of the inputs and (or `None`) of the targets.
PullBack = Callable[[Gradient], tuple[Tensor, Tensor | None]]


class Trials:
    """The matching problem of several observations.

    `observations`: under one model, of one shape, all of one kind. `restarts`: trials per observation.
    `labels`: `(N, B, ...)` to hold the trials to, or `None`: they are variables, as `label_mode` says.
    `chunk_size`: trials at a time in a gradient; a bound on memory. `adaptive`: use what the observations' `knowledge`
        says of the message.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        *,
        restarts: int = 1,
        labels: Rest | None = None,
        label_mode: LabelMode = "given",
        distance: Distance | None = None,
        penalties: Sequence[Penalty] = (),
        chunk_size: int | None = None,
        adaptive: bool = False,
    ) -> None:
        first = observations[0]
        check_alike(observations)
        self.observation, self.restarts = first, restarts
        self.function = first.loss_gradient
        self.parameters = self.function.parameters()
        self.shape = (first.batch_size, *first.input_shape)
        self.value_range = first.value_range
        self.labels, self.label_mode = labels, label_mode
        self.num_classes = first.num_classes or 0
        self.distance, self.penalties = distance or SquaredDistance(), tuple(penalties)
        self.chunk_size = chunk_size
        names = matched_names(first) if adaptive else first.sent
        known = {n: p for n, p in self.parameters.items() if n in names}
        self._sent_parameters = known
        self.sent = {n: torch.stack([o.sent[n] for o in observations]).to(p) for n, p in known.items()}
        #: Whether the factor of the sent gradient is unknown, and the best one is taken for each trial.
        self.free_scale = first.scale is None
        #: How what is declared enters the distance; `None`: nothing is.
        self.declared = Declared.of(observations, known) if adaptive else None
        if self.declared is not None and self.declared.free_scale:
            self.free_scale = True
        #: What candidates are compared by.
        self.comparison: Distance = (
            self.distance if isinstance(self.distance, MahalanobisDistance) else SquaredDistance()
        )
        #: Which picture each trial is of.
        self.picture = torch.arange(len(observations), device=self.function.device).repeat_interleave(restarts)
        self.distance.check(known)
        for penalty in self.penalties:
            penalty.check(self)

    @property
    def size(self) -> int:
        """`B D`, the elements of a trial's inputs."""
        return int(torch.Size(self.shape).numel())

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """Of a trial's label logits: `(B, C)`, `(C,)`, or `(0,)` where labels are held."""
        shapes = {"given": (0,), "joint": (self.shape[0], self.num_classes), "shared": (self.num_classes,)}
        return shapes[self.label_mode]

    def inputs(self, points: Tensor) -> Tensor:
        """`(T, B, *input_shape)`."""
        return points[:, : self.size].unflatten(1, self.shape)

    def targets(self, points: Tensor, rows: Tensor) -> Tensor:
        """What the loss gets: the given labels, or the class probabilities `(T, B, C)` of the logits."""
        if self.labels is not None:
            return rows_of(self.labels, self.picture[rows])
        probabilities = points[:, self.size :].unflatten(1, self.logits_shape).softmax(-1)
        if self.label_mode == "shared":
            probabilities = probabilities[:, None].expand(-1, self.shape[0], -1)
        return probabilities

    def hard_labels(self, points: Tensor, rows: Tensor) -> Tensor:
        """The labels to report: the given ones, or the likeliest classes `(T, B)`."""
        targets = self.targets(points, rows)
        return targets if self.labels is not None else targets.argmax(-1)

    # ------------------------------------------------------------------ the objective

    @full_precision()
    def value_and_gradient(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of the trials `rows` (indices `(R,)`) at `points` `(R, n)`: `(R,)`, and its derivative."""
        chunk = self.chunk_size or len(points)
        parts = [self._matching(p, r) for p, r in zip(points.split(chunk), rows.split(chunk), strict=True)]
        values, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.penalties:
            x = self.inputs(points).detach().requires_grad_(True)
            with torch.enable_grad():
                penalty = torch.stack([penalty(x, self) for penalty in self.penalties]).sum(0)
                (by_inputs,) = torch.autograd.grad(penalty.sum(), x)
            values = values + penalty.detach()
            gradients[:, : self.size] += by_inputs.flatten(1)
        return values, gradients

    def _matching(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_(self.labels is None)
        with torch.enable_grad():
            targets = self.targets(points, rows)
        own, pull_back = self.gradients(self.inputs(points).detach(), map_rest(Tensor.detach, targets))
        leaves = {n: g.requires_grad_(True) for n, g in self._of_sent(own, len(points)).items()}
        with torch.enable_grad():
            values = self._distance(self.distance, leaves, rows)
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()))
        change = dict(zip(leaves, slopes, strict=True))
        # What was not sent may be anything: nothing depends on it.
        by_inputs, by_targets = pull_back(
            {n: change[n] if n in change else torch.zeros_like(g) for n, g in own.items()}
        )
        gradient = by_inputs.flatten(1)
        if self.labels is None:
            assert by_targets is not None, "targets are variables"
            (by_logits,) = torch.autograd.grad(targets, points, by_targets)
            gradient = torch.cat([gradient, by_logits[:, self.size :]], dim=1)
        return values.detach(), gradient

    def matching_losses(self, inputs: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """`|c own - sent|^2 / |sent|^2` whatever the objective: `(R,)` for `inputs` `(R, B, *input_shape)`.

        Over what was sent; `c` is 1, or the best factor where it is free. For noise of a known law in Mahalanobis's
        distance.
        """
        chunk = self.chunk_size or len(inputs)
        parts = [slice(first, first + chunk) for first in range(0, len(inputs), chunk)]
        with torch.no_grad():
            own = (self.own(inputs[part], rows_of(targets, part)) for part in parts)
            return torch.cat([self._distance(self.comparison, g, rows[p]) for g, p in zip(own, parts, strict=True)])

    def own(self, inputs: Tensor, targets: Tensor) -> Gradient:
        """The trials' gradients of the parameters that were sent: `(R, *parameter_shape)` each, detached."""
        return self._of_sent(self.gradients(inputs, targets)[0], len(inputs))

    def _of_sent(self, own: Gradient, count: int) -> Gradient:
        """The part that was sent, detached; zeros for a parameter that no gradient reaches (a bypassed lookup)."""
        parts = {n: own[n].detach() for n in self.sent if n in own}
        return {n: parts[n] if n in parts else p.new_zeros(count, *p.shape) for n, p in self._sent_parameters.items()}

    def _distance(self, distance: Distance, own: Gradient, rows: Tensor) -> Tensor:
        sent = self._sent(rows)
        if self.declared is not None:
            own, sent = self.declared.pair(own, sent, self.picture[rows], free_scale=self.free_scale)
        return distance.scaled(own, sent) if self.free_scale else distance(own, sent)

    def _sent(self, rows: Tensor) -> Gradient:
        if len(self.picture) == self.restarts:
            return self.sent  # one picture: one row serves all
        return {n: g[self.picture[rows]] for n, g in self.sent.items()}

    # ------------------------------------------------------------------ gradients of many trials

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Gradient, PullBack]:
        """Each trial's gradient, `(R, *parameter_shape)` per parameter, and the transpose of its derivative.

        `inputs`: `(R, B, *input_shape)`; `targets`: `(R, B, ...)`.
        """
        soft = isinstance(targets, Tensor) and targets.is_floating_point()
        if self.observation.local is None:
            with failures_named(self.function):
                way = way_of(Problems(self.function, self.parameters, inputs, targets), with_targets=soft)
                own = way.gradients()

            def pull_back(change: Gradient) -> tuple[Tensor, Tensor | None]:
                with failures_named(self.function):
                    return way.matvec_with_targets(change)

            return own, pull_back

        def one(x: Tensor, y: Tensor) -> Gradient:
            return self.observation.gradient(self.parameters, x, y)

        if soft:
            own, pull, *_ = vjp(vmap(one), inputs, targets)
            return own, lambda change: pull(change)
        own, pull, *_ = vjp(lambda x: vmap(one)(x, targets), inputs)
        return own, lambda change: (pull(change)[0], None)


def check_alike(observations: Sequence[Observation]) -> None:
    """Raises `InputError` for observations that cannot be attacked together."""
    if not observations:
        raise InputError("There is no observation to attack.")
    first = observations[0]
    strange = [type(o).__name__ for o in observations if not isinstance(o, Observation)]
    if strange:
        raise InputError(f"An attack is given `Observation` objects, got {strange[0]}.")
    for position, other in enumerate(observations[1:], start=1):
        for name in ("batch_size", "input_shape", "num_classes", "value_range", "local", "not_sent"):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"Observations that are attacked together must be of one kind: observation {position} has "
                    f"`{name}={getattr(other, name)}`, the first {getattr(first, name)}."
                )
        if (other.scale is None) != (first.scale is None):
            raise InputError("Give the factors (`scale`) of all observations that are attacked together, or of none.")
        if other.loss_gradient.model is not first.loss_gradient.model:
            raise InputError(
                f"Observations that are attacked together must share one model; observation {position} has another. "
                "Attack them one by one."
            )
        if (other.labels is None) != (first.labels is None):
            raise InputError("Give the labels of all observations that are attacked together, or of none.")
