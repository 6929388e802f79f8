"""A whole data set in one pass: what each example's gradient gives away. Averages hide victims.

Zhang et al. 2023 (arXiv 2309.13016) find that the same noise protects examples very unequally. A survey has the numbers
per example and per class; it can be stopped at any time and goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils.data import Dataset

from gradguard.defenses import Defense, GaussianNoise
from gradguard.defenses.base import randn
from gradguard.errors import InputError
from gradguard.evaluation.datasets import chunks, in_memory, length
from gradguard.evaluation.datasets import class_names as names_of
from gradguard.evaluation.measurement import MAX_ITERATIONS, measure
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode
from gradguard.functional.structures import Rest, map_rest, named_leaves, rows_of, targets_of
from gradguard.functional.vectors import Gradient, flatten
from gradguard.functional.whole_batch import moved, num_examples, rows_of_tree, take
from gradguard.guard import Guard
from gradguard.report.survey_report import DTYPES, NO_CLASS, ClassSummary, ExampleSummary, Survey
from gradguard.storage.checkpoint import Checkpoint
from gradguard.storage.environment import environment
from gradguard.storage.fingerprint import example_digests, fingerprint, plain_repr
from gradguard.storage.progress import progress_bar
from gradguard.threats.model import check_in_range, check_value_range
from gradguard.zoo.pictures import Pictures

__all__ = ["YARDSTICK", "ClassSummary", "ExampleSummary", "Survey", "survey"]

#: The noise that examples are compared under unless told otherwise.
YARDSTICK = GaussianNoise(noise_ratio=0.5)
#: Examples at a time where they are few parameters' worth, and the elements of one chunk's gradients at most.
BATCH_SIZE, CHUNK_ELEMENTS = 64, 2**25
#: A bound counts as converged when an eigenvalue is known to lie this close to the Ritz value, relative.
TOLERANCE = 0.1
#: Seconds between two writes of a checkpoint; a write that takes long is made rarer.
SAVE_EVERY = 2.0

Columns = dict[str, Tensor]


def survey(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Dataset | Pictures | tuple[Any, Any] | Iterable,
    *,
    defense: Defense = YARDSTICK,
    exact: bool = False,
    examples: int | None = None,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    class_names: Sequence[str] = (),
    train_mode: TrainMode = "error",
    input_module: str | None = None,
    private: str | int | None = None,
    lanczos_steps: int = 20,
    max_iterations: int = MAX_ITERATIONS,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = True,
) -> Survey:
    """Measure every example of `data` by itself: as a batch of one, what an attacker sees who knows all the others.

    Args:
        model: At the weights that are measured.
        loss_fn: `(outputs, targets) -> scalar`.
        data: A `torch.utils.data.Dataset` of `(input, target)`; an iterable of batches `(inputs, targets)` such as an
            unshuffled `DataLoader`; a pair of tensors `(N, *input_shape)` and `(N, ...)`; or
            `gradguard.zoo.pictures.Pictures`. Examples go to the model's device.
        defense: What perturbs each example's gradient. The default relates the noise to the example's own gradient;
            `GaussianNoise(std=...)` is the same noise for all.
        exact: Also solve for the predicted error (I2F; Zhang et al. 2023, Eq. 4) itself, in float64 where the Jacobian
            is small enough to be formed. It costs many times the lower bound (Eq. 5), and the two may order examples
            differently.
        examples: Only the first so many, at least 1. Default: all.
        batch_size: Examples at a time, at least 1. It bounds memory (a few times `batch_size * P` elements); no number
            depends on it beyond rounding. Default: 64, fewer for large models.
        checkpoint: A file that holds what is measured so far, a `Survey` like the result. It is written every few
            seconds and when the pass ends, by an exception or Ctrl-C too. The same call then goes on from there, and
            gives the same result as an uninterrupted one. Data that were measured are read again, to see that they are
            the same.
        seed: The random numbers of example `i` are those of `(seed, i)` and of nothing else, so that they do not depend
            on where the pass was interrupted. They are drawn on a CUDA model's device, else on the CPU.
        class_names: One per class. Default: the data set's own.
        train_mode: See `LossGradient`.
        input_module: See `LossGradient`: the module that looks tokens up. They are embedded; `value_range=None` then.
        private: See `LossGradient`: which input is private.
        lanczos_steps: Steps for `lambda_max`, at least 1. Fixed per example, so that results do not depend on the
            batch.
        max_iterations: Of the exact solver on inputs too large for a dense Jacobian, at least 1.
        value_range: `(low, high)` of valid inputs; others are refused, since an error is judged in it. `None` allows
            all.
        progress: A bar on standard error, where that is a terminal.

    Returns:
        The numbers per example, in the order of `data`, and what follows from them per class.

    Raises:
        InputError: Data cannot be measured (the message names the example), an option is outside its range, or the
            checkpoint is of another model, of other data or of other options (the message names the difference).
        UnsupportedModelError: The model mixes examples or is random in training mode, see `train_mode`.
    """
    for name, value in (("lanczos_steps", lanczos_steps), ("max_iterations", max_iterations)):
        _require_at_least_one(name, value)
    for name, optional in (("examples", examples), ("batch_size", batch_size)):
        if optional is not None:
            _require_at_least_one(name, optional)
    check_value_range(value_range)
    if defense is None:
        raise InputError(
            "`defense` must be the noise that examples are compared under, such as GaussianNoise(noise_ratio=0.5): "
            "without any, gradient matching misses none of them."
        )
    guard = Guard(defense=defense, attacks=(), train_mode=train_mode, input_module=input_module, private=private)
    function = guard.loss_gradient(model, loss_fn)
    function.check_model()
    measurement = _Measurement(function, defense, exact, seed, lanczos_steps, max_iterations, value_range)
    size = batch_size or max(1, min(BATCH_SIZE, CHUNK_ELEMENTS // function.num_parameters))
    if examples is not None and length(data) is not None:
        examples = min(examples, length(data) or 0)
    stored = None if checkpoint is None else Path(checkpoint)
    measured = _Progress(stored, measurement, tuple(class_names) or names_of(data))
    if in_memory(data) is not None:
        # What is wrong with the last example is better said now than after an hour.
        for number, (inputs, targets) in enumerate(chunks(data, size, examples)):
            _check(*_taken(function, inputs, targets), number * size, value_range)
    position = 0
    try:
        with progress_bar("measuring examples", examples or length(data), shown=None if progress else False) as bar:
            for inputs, targets in chunks(data, size, examples):
                digest, count = example_digests(*_columns(inputs), *_columns(targets)), num_examples(inputs)
                known = measured.recognise(digest, position)
                if known < count:
                    fresh = (rows_of_tree(part, slice(known, None), count) for part in (inputs, targets))
                    bound, own, rest = _taken(function, *fresh)
                    columns = replace(measurement, function=bound)(own, rest, position + known)
                    measured.add(columns | {"digest": digest[known:]}, tuple(own.shape[1:]))
                position += count
                bar.to(position)
        if position == 0:
            raise InputError("`data` hold no example: there is nothing to measure.")
        measured.finish(position, examples)
    finally:
        measured.save()
    return replace(measured.survey().first(position), complete=True)


# ---------------------------------------------------------------------- the measures of a chunk


@dataclass(frozen=True)
class _Measurement:
    """How examples are measured: everything that a number depends on, except the example."""

    function: LossGradient
    defense: Defense
    exact: bool
    seed: int
    lanczos_steps: int
    max_iterations: int
    value_range: tuple[float, float] | None = (0.0, 1.0)

    def conditions(self) -> dict[str, str]:
        """What must be the same for numbers to go together, as text."""
        function = self.function
        found = {
            "gradguard": version("gradguard"),
            "model": f"{type(function.model).__name__} {fingerprint(function.model)}",
            "loss": f"{plain_repr(function.loss_fn)} {fingerprint(function.loss_fn)}",
            "train mode": function.train_mode,
            "defense": plain_repr(self.defense),
            "seed": str(self.seed),
            "exact": str(self.exact),
            "lanczos_steps": str(self.lanczos_steps),
            "dtype": str(function.computing_dtype).removeprefix("torch."),
            "random numbers": self._generator_device(),
        }
        named = {"input module": function.input_module, "private": function.private}
        found |= {name: str(value) for name, value in named.items() if value is not None}
        return found | ({"max_iterations": str(self.max_iterations)} if self.exact else {})

    def __call__(self, inputs: Tensor, targets: Rest, first: int) -> Columns:
        """Every column but the digest, for examples `first`, `first + 1`, ... of the data."""
        function = self.function
        _check(function, inputs, targets, first, self.value_range)
        inputs, targets = function.cast(inputs.detach()), function.cast(map_rest(torch.Tensor.detach, targets))
        parameters = function.parameters()

        gradients, losses = _own_gradients(function, parameters, inputs, targets)
        gradient_norm = torch.linalg.vector_norm(flatten(gradients, batch_dims=1), dim=-1)
        _check_finite(losses + gradient_norm, losses, first)
        delta, start = self._random_part(gradients, inputs, targets, first)
        # Operators of batches of one, so that nothing is weighted by the number of examples in the chunk.
        jacobian = InputJacobian.of_trials(function, inputs[:, None], rows_of(targets, (slice(None), None)))
        # A tolerance of zero: all the steps, whatever the neighbours in the chunk need.
        found = measure(
            jacobian,
            delta,
            exact=self.exact,
            max_iterations=self.max_iterations,
            tolerance=0.0,
            steps=min(self.lanczos_steps, jacobian.size),
            random=start,
        )
        bounded = found.room <= TOLERANCE * found.lambda_max
        columns = {
            "label": _labels(targets_of(targets), len(inputs)),
            "loss": losses,
            "gradient_norm": gradient_norm,
            "noise_norm": torch.linalg.vector_norm(flatten(delta, batch_dims=1), dim=-1),
            "projection": found.projected,
            "lambda_max": found.lambda_max,
            "lower_bound": found.lower_bound,
            "predicted_error": found.predicted_error if self.exact else torch.full_like(losses, torch.nan),
            "converged": found.traceless | (found.converged if self.exact else bounded),
        }
        return {name: column.cpu().to(DTYPES[name]) for name, column in columns.items()}

    def _random_part(
        self, gradients: dict[str, Tensor], inputs: Tensor, targets: Rest, first: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Perturbations `(R, *parameter_shape)` per parameter, and start vectors for Lanczos `(R, D)`."""
        deltas, starts = [], []
        for r in range(len(inputs)):
            generator = torch.Generator(self._generator_device()).manual_seed(_seed_of(self.seed, first + r))
            starts.append(randn((inputs[r].numel(),), inputs, generator))
            jacobian = None
            if self.defense.needs_jacobian:
                jacobian = InputJacobian(
                    self.function, inputs[r : r + 1], rows_of(targets, slice(r, r + 1)), validate=False
                )
            gradient = {n: g[r] for n, g in gradients.items()}
            deltas.append(self.defense.perturbation(gradient, jacobian, generator=generator))
        return {n: torch.stack([delta[n] for delta in deltas]) for n in gradients}, torch.stack(starts)

    def _generator_device(self) -> str:
        return "cuda" if self.function.device.type == "cuda" else "cpu"


def _taken(function: LossGradient, inputs: Any, targets: Any) -> tuple[LossGradient, Tensor, Rest]:
    """A chunk of the data as the function takes it, on the model's device."""
    return take(function, moved(inputs, function.device), moved(targets, function.device))


def _columns(tree: Any) -> list[Tensor]:
    """Every tensor of a chunk's inputs or targets, `(B, ...)`."""
    return [leaf for _, leaf in named_leaves(tree) if isinstance(leaf, Tensor)]


def _own_gradients(
    function: LossGradient, parameters: Gradient, inputs: Tensor, targets: Rest
) -> tuple[Gradient, Tensor]:
    """Each example's own gradient, `(B, *parameter_shape)` per parameter, and its loss, `(B,)`."""

    def loss(p: Gradient, x: Tensor, y: Rest) -> Tensor:
        return function.loss(p, x[None], map_rest(lambda part: part[None], y))

    try:
        return vmap(grad_and_value(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        # What cannot be mapped over, as a forward pass that looks at its data: one by one.
        found, losses = [], []
        for r in range(len(inputs)):
            own = inputs[r : r + 1], rows_of(targets, slice(r, r + 1))
            found.append(function.gradient_at(parameters, *own))
            losses.append(function.loss(parameters, *own).detach())
        return {n: torch.stack([g[n] for g in found]) for n in parameters}, torch.stack(losses)


def _seed_of(seed: int, example: int) -> int:
    """The seed of one example's generator; `seed + example` would give neighbouring seeds the same noise."""
    return int(np.random.SeedSequence((seed % 2**64, example)).generate_state(1, np.uint64)[0])


def _labels(targets: Tensor | None, count: int) -> Tensor:
    """`(B,)` int64: targets of one whole number per example as class indices, anything else as `NO_CLASS`."""
    if targets is None or targets.numel() != count:
        return torch.full((count,), NO_CLASS)
    targets = targets.flatten()
    whole = (targets == targets.round()) & (targets >= 0) if targets.is_floating_point() else targets >= 0
    return torch.where(whole, targets, torch.full_like(targets, NO_CLASS)).to(torch.int64)


def _check(
    function: LossGradient, inputs: Tensor, targets: Rest, first: int, value_range: tuple[float, float] | None
) -> None:
    """`check_batch` and `check_in_range`, with the example at fault named."""
    try:
        function.check_batch(inputs, targets)
        check_in_range(inputs, value_range)
    except InputError as whole:
        for r in range(len(inputs)):
            try:
                function.check_batch(inputs[r : r + 1], rows_of(targets, slice(r, r + 1)))
                check_in_range(inputs[r], value_range)
            except InputError as error:
                raise InputError(f"Example {first + r} of the data: {error}") from error
        raise whole


def _check_finite(values: Tensor, losses: Tensor, first: int) -> None:
    broken = (~values.isfinite()).nonzero()
    if len(broken):
        r = int(broken[0])
        raise InputError(
            f"Example {first + r} of the data: its loss is {losses[r].item()} or its gradient is not finite, so "
            "nothing can be measured on it. Leave it out, or look for diverged parameters and for labels that the "
            "loss ignores."
        )


def _require_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"`{name}` must be at least 1, got {value}.")


# ---------------------------------------------------------------------- what is measured so far


class _Progress:
    """The columns so far, in memory and in the checkpoint."""

    def __init__(self, path: Path | None, measurement: _Measurement, class_names: tuple[str, ...]) -> None:
        self.path = path
        self.measurement = measurement
        self.class_names = class_names
        self.parts: list[Columns] = []
        self.input_shape: tuple[int, ...] = ()
        self.complete = False
        self.saved = True
        self.file = None if path is None else Checkpoint(path)
        self.earlier: Columns = {}
        self.conditions = measurement.conditions()
        if self.file is not None and self.file.exists:
            self._resume(Survey.load(self.file.path))

    @property
    def known(self) -> int:
        """How many examples the checkpoint had."""
        return len(self.earlier["label"]) if self.earlier else 0

    def recognise(self, digest: Tensor, position: int) -> int:
        """How many of the chunk's examples are in the checkpoint. Raises `InputError` if it had others there."""
        count = max(0, min(len(digest), self.known - position))
        other = (digest[:count] != self.earlier["digest"][position : position + count]) if count else digest[:0]
        if other.any():
            index = position + int(other.nonzero()[0])
            raise InputError(
                f"The checkpoint {str(self.path)!r} is of other data: example {index} is not the one that was "
                "measured. Give the same data in the same order (`shuffle=False`, no random transform), or name "
                "another checkpoint."
            )
        return count

    def add(self, columns: Columns, input_shape: tuple[int, ...]) -> None:
        """Take in a chunk; write the checkpoint if it is time."""
        self.parts.append(columns)
        self.input_shape, self.saved, self.complete = input_shape, False, False
        if self.file is not None and self.file.due(SAVE_EVERY):
            self.save()

    def finish(self, position: int, examples: int | None) -> None:
        """The data have ended, or `examples` of them are done."""
        if position < self.known and position != examples:
            raise InputError(
                f"The checkpoint {str(self.path)!r} holds {self.known} examples and the data only {position}: these "
                "are other data. Name another checkpoint."
            )
        if position >= self.known and not self.complete:
            self.complete, self.saved = True, False

    def save(self) -> None:
        """Write the checkpoint, if there is something new."""
        if self.file is None or self.saved or not self.parts:
            return
        self.file.save(*self.survey().parts())
        self.saved = True

    def survey(self) -> Survey:
        """Everything so far."""
        self.parts = [{name: torch.cat([part[name] for part in self.parts]) for name in DTYPES}]
        function = self.measurement.function
        return Survey(
            model=type(function.model).__name__,
            defense=plain_repr(self.measurement.defense),
            input_shape=self.input_shape,
            class_names=self.class_names,
            exact=self.measurement.exact,
            complete=self.complete,
            conditions=self.conditions,
            environment=environment(function.device, function.computing_dtype),
            **self.parts[0],
        )

    def _resume(self, earlier: Survey) -> None:
        differing = [
            f"{name} {earlier.conditions.get(name, 'unknown')} there, {value} here"
            for name, value in self.conditions.items()
            if earlier.conditions.get(name) != value
        ]
        if differing:
            raise InputError(
                f"The checkpoint {str(self.path)!r} is of another survey: {'; '.join(differing)}. Call with the same "
                "model and options to go on with it, name another checkpoint, or delete this one to start anew."
            )
        self.earlier = {name: getattr(earlier, name) for name in DTYPES}
        self.parts, self.input_shape, self.complete = [self.earlier], earlier.input_shape, earlier.complete
