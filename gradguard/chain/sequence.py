"""A model as its steps: one after another, or as a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.chain.activation import Activation, Shape
from gradguard.chain.rewiring import Rewire
from gradguard.chain.steps import Affine, MaxPool, MeanPool, Reshape, Residual, Step, Sum
from gradguard.errors import UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient


@dataclass(frozen=True)
class Chain:
    """A model's steps, first to last. Parameters are passed in by name, as `LossGradient` has them.

    Args:
        steps: First to last.
        input_shape: Of one example.
    """

    steps: tuple[Step, ...]
    input_shape: Shape

    @property
    def affine_indices(self) -> tuple[int, ...]:
        """Where in `steps` the layers with weights are."""
        return tuple(i for i, s in enumerate(self.steps) if isinstance(s, Affine))

    @property
    def layers(self) -> tuple[Affine, ...]:
        """The layers with weights, first to last, those inside of residual blocks included."""
        found: list[Affine] = []
        for step in self.steps:
            if isinstance(step, Affine):
                found.append(step)
            elif isinstance(step, Residual):
                found += Chain(step.branch, step.input_shape).layers + Chain(step.skip, step.input_shape).layers
        return tuple(found)

    def __call__(
        self, x: Tensor, parameters: Mapping[str, Tensor], *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The value after `steps[start:stop]`. `x`: the input of step `start`, one example without batch dimension."""
        for step in self.steps[start:stop]:
            x = step(x, parameters)
        return x

    @property
    def moves(self) -> bool:
        """Whether only reshapes and rewirings come before the first layer, so that its input gives the model's."""
        return all(isinstance(step, Reshape | Rewire) for step in self.steps[: self.affine_indices[0]])

    def undone(self, x: Tensor) -> Tensor:
        """The model's input from the first layer's, if `moves`. `x`: `(B, ...)`, one row per example."""
        for step in reversed(self.steps[: self.affine_indices[0]]):
            assert isinstance(step, Reshape | Rewire), "asked for before"
            if isinstance(step, Rewire):
                x = torch.stack([step.inverse(row) for row in x])
        return x.reshape(len(x), *self.input_shape)

    def check_invertible(self, stop: int, *, partly: bool = False) -> None:
        """Refuse a chain with steps that are not one-to-one.

        Args:
            stop: Steps before this one are looked at.
            partly: Let pass what hides some of its input and says where: ReLU, average pooling.

        Raises:
            UnsupportedModelError: Naming the step that is not.
        """
        for index, step in enumerate(self.steps[:stop]):
            if isinstance(step, Residual):
                _check_residual(step, self.steps[index + 1 : stop])
            if isinstance(step, MeanPool) and not partly:
                raise UnsupportedModelError(
                    f"Module {step.name!r} ({step.kind}) averages, which loses part of its input. Use a convolution "
                    "with a stride, or attack by gradient matching."
                )
            if isinstance(step, Activation) and not (step.partly_invertible if partly else step.invertible):
                raise UnsupportedModelError(
                    f"Activation {step.name!r} ({step.kind}) is not one-to-one, so the output of the layer before it "
                    "does not follow from its value. Use LeakyReLU, ELU, Softplus, Sigmoid or Tanh there, or attack by "
                    "gradient matching."
                )


def _check_residual(block: Residual, above: Sequence[Step]) -> None:
    """Raises `UnsupportedModelError` for a block that R-GAP cannot separate into its summands."""
    if block.end < 0:
        raise UnsupportedModelError(
            f"The sum {block.name!r} cannot be separated: R-GAP finds a summand from the gradient of the layer that it "
            "comes from, and this branch ends in something else. End it in Linear or Conv2d (with batch normalisation "
            "in eval mode, if any), or attack by gradient matching."
        )
    for step in above:
        if isinstance(step, Affine | Residual):
            break
        if isinstance(step, MeanPool) or (isinstance(step, Activation) and step.flat):
            raise UnsupportedModelError(
                f"{step.name!r} ({step.kind}) after the sum {block.name!r} hides part of it, which neither summand "
                "brings back. R-GAP separates sums that are followed by a one-to-one activation or by none (blocks "
                "with the activations first); attack other models by gradient matching."
            )
    Chain(block.skip, block.input_shape).check_invertible(len(block.skip))


@dataclass(frozen=True)
class Graph:
    """A model's steps where values may branch and be summed: what the rank analysis reads.

    Args:
        steps: In the order of their computation.
        sources: For each step the indices of the steps whose values it takes, -1 for the input; all are smaller than
            its own.
        input_shape: Of one example.
    """

    steps: tuple[Step | MaxPool | Sum, ...]
    sources: tuple[tuple[int, ...], ...]
    input_shape: Shape

    @property
    def affine_indices(self) -> tuple[int, ...]:
        """Where in `steps` the layers with weights are."""
        return tuple(i for i, s in enumerate(self.steps) if isinstance(s, Affine))

    @property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each step the indices of those that take its value."""
        return tuple(tuple(j for j, s in enumerate(self.sources) if i in s) for i in range(len(self.steps)))

    @property
    def dominators(self) -> tuple[frozenset[int], ...]:
        """For each step, the steps that every path from the input to it goes through, itself included."""
        found: list[frozenset[int]] = []
        for index, sources in enumerate(self.sources):
            before = [found[s] if s >= 0 else frozenset[int]() for s in sources]
            found.append(frozenset.intersection(*before) | {index})
        return tuple(found)

    def values(self, x: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The value of each step. `x`: one example without batch dimension."""
        found: list[Tensor] = []
        for step, sources in zip(self.steps, self.sources, strict=True):
            arguments = [found[s] if s >= 0 else x for s in sources]
            found.append(arguments[0] + arguments[1] if isinstance(step, Sum) else step(arguments[0], parameters))
        return found

    def __call__(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value of the last step."""
        return self.values(x, parameters)[-1]


def all_parameters(gradient: LossGradient) -> Gradient:
    """Trainable and frozen parameters by name, in the computing dtype: what a `Chain` is called with."""
    return gradient.constants() | gradient.parameters()
