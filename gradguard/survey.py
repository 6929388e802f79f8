"""A whole data set in one pass: what each example's gradient gives away. Averages hide victims.

Zhang et al. 2023 (arXiv 2309.13016) find that the same noise protects examples very unequally. A survey has the numbers
per example and per class; it can be stopped at any time and goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils.data import Dataset, IterableDataset

from gradguard.defenses import Defense, GaussianNoise
from gradguard.defenses.base import randn
from gradguard.errors import InputError
from gradguard.evaluation.measurement import MAX_ITERATIONS, measure
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient, TrainMode
from gradguard.functional.vectors import flatten
from gradguard.guard import Guard, environment
from gradguard.report.survey_report import DTYPES, NO_CLASS, ClassSummary, ExampleSummary, Survey
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

Batch = tuple[Tensor, Tensor]
Columns = dict[str, Tensor]


def survey(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Dataset | Pictures | tuple[Tensor, Tensor] | Iterable,
    *,
    defense: Defense = YARDSTICK,
    exact: bool = False,
    examples: int | None = None,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    class_names: Sequence[str] = (),
    train_mode: TrainMode = "error",
    lanczos_steps: int = 20,
    max_iterations: int = MAX_ITERATIONS,
    value_range: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = True,
) -> Survey:
    """Measure every example of `data` by itself: as a batch of one, what an attacker sees who knows all the others.

    `data`: a `torch.utils.data.Dataset` of `(input, target)`; an iterable of batches `(inputs, targets)` such as an
    unshuffled `DataLoader`; a pair of tensors; or `gradguard.zoo.pictures.Pictures`. Examples go to the model's device.
    `defense`: what perturbs each example's gradient. The default relates the noise to the example's own gradient;
    `GaussianNoise(std=...)` is the same noise for all.
    `exact`: also solve for the predicted error (I2F) itself, in float64 where the Jacobian is small enough to be
    formed: many times the cost of the lower bound, whose order need not be the error's.
    `examples`: only the first so many.
    `batch_size`: examples at a time. It bounds memory (a few times `batch_size * P` elements); no number depends on it
    beyond rounding. Default: 64, fewer for large models.
    `checkpoint`: a file that holds what is measured so far, a `Survey` like the result. It is written every few seconds
    and when the pass ends, by an exception or Ctrl-C too; the same call then goes on from there, and gives the same
    result as an uninterrupted one. Data that were measured are read again, to see that they are the same.
    `seed`: the random numbers of example `i` are those of `(seed, i)` and of nothing else: a generator's would depend
    on where the pass was interrupted. They are drawn on a CUDA model's device, else on the CPU.
    `class_names`: default: the data set's own. `train_mode`: see `LossGradient`.
    `lanczos_steps`: for `lambda_max`, the same number for every example, since a joint stopping rule would make an
    example's number depend on its neighbours. `max_iterations`: of the exact solver on inputs too large for a dense
    Jacobian. `value_range`: of valid inputs; others are refused, since an error is judged in it. `None` allows all.
    `progress`: a bar on standard error, where that is a terminal.

    Raises `InputError` for data that cannot be measured, naming the example, and for a checkpoint of another model, of
    other data or of other options, naming the difference.
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
    function = Guard(defense=defense, attacks=(), train_mode=train_mode).loss_gradient(model, loss_fn)
    function.check_model()
    measurement = _Measurement(function, defense, exact, seed, lanczos_steps, max_iterations, value_range)
    size = batch_size or max(1, min(BATCH_SIZE, CHUNK_ELEMENTS // function.num_parameters))
    if examples is not None and _length(data) is not None:
        examples = min(examples, _length(data) or 0)
    stored = None if checkpoint is None else Path(checkpoint)
    measured = _Progress(stored, measurement, tuple(class_names) or _class_names(data))
    if _in_memory(data) is not None:
        # What is wrong with the last example is better said now than after an hour.
        for number, (inputs, targets) in enumerate(_chunks(data, size, examples)):
            _check(function, inputs.to(function.device), targets.to(function.device), number * size, value_range)
    position = 0
    try:
        with _bar(examples or _length(data), shown=progress) as advance:
            for inputs, targets in _chunks(data, size, examples):
                digest = _digests(inputs, targets)
                known = measured.recognise(digest, position)
                if known < len(inputs):
                    fresh = inputs[known:].to(function.device), targets[known:].to(function.device)
                    columns = measurement(*fresh, position + known)
                    measured.add(columns | {"digest": digest[known:]}, tuple(inputs.shape[1:]))
                position += len(inputs)
                advance(position)
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
            "gradguard": environment(function)["gradguard"],
            "model": f"{type(function.model).__name__} {_fingerprint(function.model)}",
            "loss": f"{_plain_repr(function.loss_fn)} {_fingerprint(function.loss_fn)}",
            "train mode": function.train_mode,
            "defense": _plain_repr(self.defense),
            "seed": str(self.seed),
            "exact": str(self.exact),
            "lanczos_steps": str(self.lanczos_steps),
            "dtype": str(function.computing_dtype).removeprefix("torch."),
            "random numbers": self._generator_device(),
        }
        return found | ({"max_iterations": str(self.max_iterations)} if self.exact else {})

    def __call__(self, inputs: Tensor, targets: Tensor, first: int) -> Columns:
        """Every column but the digest, for examples `first`, `first + 1`, ... of the data."""
        function = self.function
        _check(function, inputs, targets, first, self.value_range)
        inputs, targets = function.cast(inputs.detach()), function.cast(targets.detach())
        parameters = function.parameters()

        def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return function.loss(p, x[None], y[None])

        gradients, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
        gradient_norm = torch.linalg.vector_norm(flatten(gradients, batch_dims=1), dim=-1)
        _check_finite(losses + gradient_norm, losses, first)
        delta, start = self._random_part(gradients, inputs, targets, first)
        # Operators of batches of one, so that nothing is weighted by the number of examples in the chunk.
        jacobian = InputJacobian.of_trials(function, inputs[:, None], targets[:, None])
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
            "label": _labels(targets),
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
        self, gradients: dict[str, Tensor], inputs: Tensor, targets: Tensor, first: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Perturbations `(R, *parameter_shape)` per parameter, and start vectors for Lanczos `(R, D)`."""
        deltas, starts = [], []
        for r in range(len(inputs)):
            generator = torch.Generator(self._generator_device()).manual_seed(_seed_of(self.seed, first + r))
            starts.append(randn((inputs[r].numel(),), inputs, generator))
            jacobian = None
            if self.defense.needs_jacobian:
                jacobian = InputJacobian(self.function, inputs[r : r + 1], targets[r : r + 1], validate=False)
            gradient = {n: g[r] for n, g in gradients.items()}
            deltas.append(self.defense.perturbation(gradient, jacobian, generator=generator))
        return {n: torch.stack([delta[n] for delta in deltas]) for n in gradients}, torch.stack(starts)

    def _generator_device(self) -> str:
        return "cuda" if self.function.device.type == "cuda" else "cpu"


def _seed_of(seed: int, example: int) -> int:
    """The seed of one example's generator; `seed + example` would give neighbouring seeds the same noise."""
    return int(np.random.SeedSequence((seed % 2**64, example)).generate_state(1, np.uint64)[0])


def _labels(targets: Tensor) -> Tensor:
    """`(B,)` int64: targets of one whole number per example as class indices, anything else as `NO_CLASS`."""
    if targets.numel() != len(targets):
        return torch.full((len(targets),), NO_CLASS, device=targets.device)
    targets = targets.flatten()
    whole = (targets == targets.round()) & (targets >= 0) if targets.is_floating_point() else targets >= 0
    return torch.where(whole, targets, torch.full_like(targets, NO_CLASS)).to(torch.int64)


def _check(
    function: LossGradient, inputs: Tensor, targets: Tensor, first: int, value_range: tuple[float, float] | None
) -> None:
    """`check_batch` and `check_in_range`, with the example at fault named."""
    try:
        function.check_batch(inputs, targets)
        check_in_range(inputs, value_range)
    except InputError as whole:
        for r in range(len(inputs)):
            try:
                function.check_batch(inputs[r : r + 1], targets[r : r + 1])
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
        self.last_write, self.write_seconds = time.monotonic(), 0.0
        self.earlier: Columns = {}
        self.conditions = measurement.conditions()
        if path is not None and path.is_dir():
            raise InputError(f"`checkpoint` must name a file, and {str(path)!r} is a folder.")
        if path is not None and path.exists():
            self._resume(Survey.load(path))

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
        # A write of everything so far is never to take more than a twentieth of the time.
        if time.monotonic() - self.last_write > max(SAVE_EVERY, 20 * self.write_seconds):
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
        if self.path is None or self.saved or not self.parts:
            return
        begun = time.monotonic()
        self.survey().save(self.path)
        self.last_write, self.saved = time.monotonic(), True
        self.write_seconds = self.last_write - begun

    def survey(self) -> Survey:
        """Everything so far."""
        self.parts = [{name: torch.cat([part[name] for part in self.parts]) for name in DTYPES}]
        function = self.measurement.function
        return Survey(
            model=type(function.model).__name__,
            defense=_plain_repr(self.measurement.defense),
            input_shape=self.input_shape,
            class_names=self.class_names,
            exact=self.measurement.exact,
            complete=self.complete,
            conditions=self.conditions,
            environment=environment(function),
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


def _plain_repr(thing: Any) -> str:
    """`repr` without addresses in memory, the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def _fingerprint(thing: Any) -> str:
    """A hash of a module's structure, settings, parameters and buffers; of the name, for a plain function."""
    hashed = hashlib.blake2b(_plain_repr(thing).encode(), digest_size=8)
    if isinstance(thing, nn.Module):
        for name, module in thing.named_modules():
            # What a repr leaves out: `label_smoothing`, for instance. `training` is covered by the train mode.
            settings = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
            settings.pop("training", None)
            hashed.update(f"{name} {sorted(settings.items())}".encode())
        for name, tensor in sorted(chain(thing.named_parameters(), thing.named_buffers()), key=lambda pair: pair[0]):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
            hashed.update(_bytes(tensor.detach().reshape(1, -1))[0])
    return hashed.hexdigest()


def _digests(inputs: Tensor, targets: Tensor) -> Tensor:
    """`(B,)` int64: a hash of each example's input and target."""
    rows = zip(
        _bytes(inputs.detach().reshape(len(inputs), -1)),
        _bytes(targets.detach().reshape(len(targets), -1)),
        strict=True,
    )
    hashes = [hashlib.blake2b(x + y, digest_size=8).digest() for x, y in rows]
    return torch.from_numpy(np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64))


def _bytes(rows: Tensor) -> list[bytes]:
    """Each row's memory; through uint8, since NumPy has no bfloat16."""
    return [row.tobytes() for row in rows.cpu().contiguous().view(torch.uint8).numpy()]


# ---------------------------------------------------------------------- reading data


def _chunks(data: Any, size: int, examples: int | None) -> Iterator[Batch]:
    """`data` as batches of `size`, the last one shorter; at most `examples` examples."""
    held: list[Batch] = []
    left = examples
    for batch in _segments(data, size):
        inputs, targets = batch if left is None else (part[:left] for part in batch)
        left = None if left is None else left - len(inputs)
        held.append((inputs, targets))
        while sum(len(x) for x, _ in held) >= size:
            inputs, targets = _joined(held)
            yield inputs[:size], targets[:size]
            held = [(inputs[size:], targets[size:])]
        if left == 0:
            break
    if sum(len(x) for x, _ in held):
        yield _joined(held)


def _segments(data: Any, size: int) -> Iterator[Batch]:
    """Batches of whatever length the data come in."""
    pair = _in_memory(data)
    if pair is not None:
        inputs, targets = _checked(*pair)
        yield from ((inputs[r : r + size], targets[r : r + size]) for r in range(0, len(inputs), size))
    elif isinstance(data, IterableDataset) or _is_map_style(data):
        examples = (data[i] for i in range(len(data))) if _is_map_style(data) else iter(data)
        # One at a time, so that an error or Ctrl-C in the data set loses nothing that was read before.
        for item in examples:
            x, y = _pair(item)
            yield _checked(torch.as_tensor(x)[None], torch.as_tensor(y)[None])
    elif isinstance(data, Iterable) and not isinstance(data, Tensor | str | bytes):
        for item in data:
            x, y = _pair(item)
            yield _checked(torch.as_tensor(x), torch.as_tensor(y))
    else:
        raise InputError(
            "`data` must be a Dataset, an iterable of (inputs, targets) such as a DataLoader, a pair of tensors or "
            f"gradguard.zoo.pictures.Pictures, got {type(data).__name__}."
        )


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"`data` must give pairs (inputs, targets), and gave a {type(item).__name__}.")
    x, y = item
    if not isinstance(x, Tensor | np.ndarray):
        raise InputError(
            f"`data` must give inputs as tensors, and gave a {type(x).__name__}. Give the data set a "
            "transform to tensors."
        )
    return x, y


def _checked(inputs: Tensor, targets: Tensor) -> Batch:
    if targets.ndim == 0 or inputs.ndim == 0 or len(inputs) != len(targets):
        raise InputError(
            f"`data` must hold one target per example, got inputs {tuple(inputs.shape)} and targets "
            f"{tuple(targets.shape)}."
        )
    return inputs, targets


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    try:
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    except RuntimeError as error:
        raise InputError(f"The examples of `data` must have one shape to be measured together: {error}.") from error


def _in_memory(data: Any) -> Batch | None:
    """Inputs and targets of data that are tensors already."""
    if isinstance(data, Pictures):
        return data.images, data.labels
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return data[0], data[1]
    return None


def _is_map_style(data: Any) -> bool:
    plain = isinstance(data, Tensor | list | tuple | str | bytes | IterableDataset)
    return not plain and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _length(data: Any) -> int | None:
    """How many examples there are, where that is known beforehand."""
    pair = _in_memory(data)
    if pair is not None:
        return len(pair[0])
    inner = data if _is_map_style(data) else getattr(data, "dataset", None)
    return len(inner) if inner is not None and hasattr(inner, "__len__") else None


def _class_names(data: Any) -> tuple[str, ...]:
    """The data set's own names: `class_names`, or `classes` as torchvision calls them."""
    for owner in (data, getattr(data, "dataset", None)):
        for name in ("class_names", "classes"):
            found = getattr(owner, name, None)
            if found:
                return tuple(str(n) for n in found)
    return ()


@contextmanager
def _bar(total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal's standard error, gone when it ends; silent where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shape = (TextColumn("measuring examples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shape, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.update(task, completed=done)
