"""What a training loop's adapters share: which gradients are new, what a step's gradient is made of, raw optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossFunction
from gradguard.functional.preserved import RandomState
from gradguard.functional.structures import map_rows, output_tensors, rebuild
from gradguard.functional.whole_batch import concatenated, num_examples


class SentOnce:
    """Remembers in which state gradients were left, so that none is perturbed twice after one backward.

    A gradient is new when its tensor is another or has been written to since: PyTorch counts writes.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[int, int]] = {}

    @staticmethod
    def state(parameter: nn.Parameter) -> tuple[int, int] | None:
        """What tells one gradient from the next; `None` without a gradient."""
        gradient = parameter.grad
        return None if gradient is None else (id(gradient), gradient._version)

    def is_new(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter has a gradient that has not been perturbed."""
        state = self.state(parameter)
        return state is not None and self._left.get(id(parameter)) != state

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """These gradients go out as they are now."""
        for parameter in parameters:
            state = self.state(parameter)
            if state is not None:
                self._left[id(parameter)] = state


class Batch(NamedTuple):
    """One batch of a step: inputs and targets, tensors or structures, and the random state before its forward pass."""

    inputs: Any
    targets: Any
    random_state: RandomState | None = None


@dataclass
class Window:
    """The batches that a step's gradient is made of.

    A batch counts once its backward has run: a `training_step` that returns `None` skips it.
    """

    batches: list[Batch] = field(default_factory=list)
    current: Batch | None = None
    stepped: bool = False

    def start(self, inputs: Any, targets: Any, random_state: RandomState | None = None) -> None:
        """A batch begins; the first one after a step begins a new window."""
        if self.stepped:
            # Kept until here, and not dropped after the step: LBFGS asks for several gradients of one batch.
            self.batches, self.stepped = [], False
        self.current = Batch(rebuild(inputs, _detached), rebuild(targets, _detached), random_state)

    def forward_begins(self, random_state: RandomState) -> None:
        """The forward pass of the current batch, or once more of the last one (LBFGS), begins at this state."""
        if self.current is not None:
            self.current = self.current._replace(random_state=random_state)
        elif self.stepped and self.batches:
            self.batches[-1] = self.batches[-1]._replace(random_state=random_state)

    def add_current(self) -> None:
        """The current batch's gradient has been added to the others'."""
        if self.current is not None:
            self.batches.append(self.current)
            self.current = None

    def joined(self) -> tuple[Any, Any]:
        """All batches of the window as one: inputs `(B, *input_shape)` and targets `(B, ...)`, or structures."""
        if len(self.batches) == 1:
            return self.batches[0].inputs, self.batches[0].targets
        try:
            return concatenated([b.inputs for b in self.batches]), concatenated([b.targets for b in self.batches])
        except InputError as error:
            raise InputError(
                f"The batches of one accumulated gradient are measured as one batch, and {error}: sort examples by "
                "shape, or leave accumulation out."
            ) from error

    def loss(self, loss_fn: LossFunction) -> LossFunction:
        """The loss of `joined()` whose gradient is the mean of the batches' own gradients."""
        sizes = tuple(num_examples(b.inputs) for b in self.batches)
        alike = len(set(sizes)) == 1 and all(_weighs_alike(loss_fn, b.targets) for b in self.batches)
        return loss_fn if len(sizes) == 1 or alike else MeanOfBatches(loss_fn, sizes)


@dataclass(frozen=True)
class MeanOfBatches:
    """The mean of a loss over batches of different sizes: an example of a small batch weighs more.

    `loss_fn`: of one batch. `sizes`: of the batches, in order. A single example has its own loss.
    """

    loss_fn: LossFunction
    sizes: tuple[int, ...]

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Outputs and targets of all batches, one after the other: a scalar."""
        count = sum(self.sizes)
        if not any(o.ndim and len(o) == count for o in output_tensors(outputs)):
            return self.loss_fn(outputs, targets)
        losses, first = [], 0
        for size in self.sizes:
            rows = slice(first, first + size)
            own, known = (map_rows(partial(_rows, rows=rows), whole, count) for whole in (outputs, targets))
            losses.append(self.loss_fn(own, known))
            first += size
        return torch.stack(losses).mean()


def _rows(part: Tensor, rows: slice) -> Tensor:
    return part[rows]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _weighs_alike(loss_fn: LossFunction, targets: Any) -> bool:
    """Whether a mean over batches of one size is the mean of their means: no class weights, nothing left out."""
    if not isinstance(targets, Tensor) or getattr(loss_fn, "weight", None) is not None:
        return False
    return targets.is_floating_point() or not bool((targets == getattr(loss_fn, "ignore_index", -100)).any())


class StepWatch:
    """Calls `perturb(optimizer)` before every step that PyTorch's optimisers take on some parameters.

    `handled(optimizer)` says that a step of the framework's has just been perturbed: what follows until the end of that
    step (gradient clipping, a gradient scaler) is left alone. Only optimisers that hold one of `parameters()` count.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]], perturb: Callable[[Optimizer], None]) -> None:
        self._parameters = parameters
        self._perturb = perturb
        self._handled: Optimizer | None = None
        self._hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def handled(self, optimizer: Optimizer) -> None:
        """The coming step of this optimiser needs nothing more."""
        self._handled = optimizer

    def forget(self) -> None:
        """A new batch: a scaler may have left out the step that `handled` spoke of."""
        self._handled = None

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = {id(p) for p in self._parameters()}
        if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            return None
        positional = len(args) > 1 and callable(args[1])
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            if self._handled is not optimizer:
                self._perturb(optimizer)
            return None

        def perturbed() -> Any:
            # The gradient comes into being in here, and with a framework's closure it is perturbed in here too.
            self._handled = None
            loss = closure()
            if self._handled is not optimizer:
                self._perturb(optimizer)
            return loss

        if positional:
            return (args[0], perturbed, *args[2:]), kwargs
        return args, kwargs | {"closure": perturbed}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._handled is optimizer:
            self._handled = None
