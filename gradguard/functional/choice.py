"""Which way products with the Jacobian go: found out at a generic point of the model, against plain autograd.

The three ways give the same numbers where they are right. Which are right for a model is a matter of its structure, not
of one batch's values: so it is asked where nothing is zero or equal by chance, at moved parameters and inputs, under a
loss of our own that weighs every output. The answer is kept for as long as the model's modules stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradguard.errors import UnsupportedModelError
from gradguard.functional.layer_by_layer import LayerByLayer, NotLayered
from gradguard.functional.layers import LAYERS
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.problems import Batch, Problems
from gradguard.functional.remembered import remembered
from gradguard.functional.structures import Rest, map_rest, output_tensors, rows_of
from gradguard.functional.vectors import Gradient
from gradguard.functional.ways import Coupled, ForwardOverReverse, ReverseOverReverse, Way

WayName = Literal["layer by layer", "forward over reverse", "reverse over reverse", "coupled"]

#: Relative differences between two ways that pass for rounding.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}
#: Models of more parameters are compared in their own precision.
FEW_PARAMETERS = 2_000_000


@dataclass(frozen=True)
class Suitability:
    """What is true of a model.

    Args:
        layered: Its gradient is made up by known layers.
        mapped: `torch.func` differentiates it right. Not looked at, and `False`, where both others are true: layer by
            layer is then taken whatever the answer.
        separate: Its outputs for an example depend on that example alone.
    """

    layered: bool
    mapped: bool
    separate: bool


def way_of(problems: Problems, *, name: WayName | None = None, given: bool = False, with_targets: bool = False) -> Way:
    """The fastest way that is right for these problems.

    Args:
        problems: Each a batch of its own, or an example of one batch.
        name: Take this way (default: `name_of`).
        given: The user asked for `name`: refuse where it does not fit, else take a slower one there.
        with_targets: Products by soft targets follow, too.

    Returns:
        The way, set up at the problems' point.

    Raises:
        UnsupportedModelError: The model cannot be differentiated twice, or `name` is not right for it.
    """
    chosen = name or name_of(problems)
    if chosen == "coupled":
        return Coupled(problems)
    if chosen == "layer by layer":
        try:
            return LayerByLayer(problems, with_targets=with_targets)
        except NotLayered as error:
            if given:
                raise UnsupportedModelError(
                    f"{type(problems.function.model).__name__} cannot go layer by layer: {error}. Leave `way` out."
                ) from error
            # This batch takes another path through the model than the generic one did.
            chosen = "reverse over reverse"
    if chosen == "forward over reverse":
        return ForwardOverReverse(problems, with_targets=with_targets)
    return ReverseOverReverse(problems, with_targets=with_targets)


def name_of(problems: Problems) -> WayName:
    """Which way `way_of` takes."""
    found = suitability(problems.function, problems.inputs[0], rows_of(problems.rest, 0), batch=problems.batch)
    alone = problems.batch is None
    if not alone and not (found.separate and problems.is_separable):
        return "coupled"
    if found.layered and (found.separate or (alone and len(problems) == 1)):
        return "layer by layer"
    return "forward over reverse" if found.mapped else "reverse over reverse"


def suitability(function: LossGradient, inputs: Tensor, rest: Rest, *, batch: Batch | None = None) -> Suitability:
    """What is true of a model for inputs of one shape. The answer is kept for as long as its modules stay what they
    are.

    Args:
        function: The loss gradient.
        inputs: `(n, *input_shape)`.
        rest: Their rest, see `gradguard.functional.structures`.
        batch: The batch that they are of, for models that take no other number of examples.

    Returns:
        The answers.

    Raises:
        UnsupportedModelError: The model cannot be differentiated twice.
    """
    if batch is not None:
        inputs, rest = batch.inputs, batch.rest
    shapes = tuple((n, t.dtype, t.shape[1:]) for n, t in rest.items()) if isinstance(rest, dict) else ()
    question = ("suitability", inputs.shape[1:], shapes, function.known_inputs, tuple(LAYERS.items()))
    return remembered(function, question, lambda: _find(function, inputs, rest))


def _find(function: LossGradient, inputs: Tensor, rest: Rest) -> Suitability:
    single = function.computing_dtype.itemsize < 4
    dtypes = [torch.float32 if single else function.computing_dtype]
    if function.num_parameters <= FEW_PARAMETERS and inputs.device.type != "mps":
        dtypes.insert(0, torch.float64)
    three = torch.arange(3, device=inputs.device) % len(inputs)
    attempts = [(dtype, rows) for dtype in dtypes for rows in (three, None)]
    problem: Exception | None = None
    for dtype, rows in attempts:
        try:
            probe = _Probe(function.with_dtype(dtype), inputs, rest, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's model raises
            problem = problem or error
            continue
        if probe.is_finite:
            return probe.suitability()
    if problem is None:
        return Suitability(layered=False, mapped=False, separate=False)
    raise UnsupportedModelError(
        f"{type(function.model).__name__} cannot be differentiated twice, by its inputs and its parameters: "
        f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}. Replace the operation that "
        "has no second derivative (a fused kernel, `cdist`, re-entrant checkpointing, an own `autograd.Function` whose "
        "backward is not differentiable)."
    ) from problem


class _Probe:
    """A model at a generic point: its products by plain autograd, and those of the other ways to compare."""

    def __init__(self, function: LossGradient, inputs: Tensor, rest: Rest, rows: Tensor | None) -> None:
        self.tolerance = TOLERANCE.get(function.computing_dtype, 5e-2)
        x, rest = function.cast(inputs.detach()), function.cast(rest)
        if rows is not None:
            x, rest = x[rows], rows_of(rest, rows)
        self.x = x + 0.05 * (x.std(correction=0) + 0.1) * _waves(x)
        self.rest, self.count = rest, len(x)
        self.parameters = {n: _moved(p) for n, p in function.parameters().items()}
        self.function = function.with_loss(_WeighedOutputs(self.count))
        with torch.no_grad():
            self.outputs = self.function.outputs(self.parameters, self.x, rest)
        together = Problems(self.function, self.parameters, self.x[None], map_rest(lambda t: t[None], rest))
        self.together = together
        batch = Batch(self.x, rest, self.outputs)
        index = torch.arange(self.count, device=x.device)
        self.singles = Problems(
            self.function, self.parameters, self.x[:, None], map_rest(lambda t: t[:, None], rest), batch, index
        )
        self.u = _waves(self.x, 1.3)
        self.delta = {n: _waves(p, 0.9 + 0.01 * k) for k, (n, p) in enumerate(self.parameters.items())}
        self.reference = self._products(ReverseOverReverse(together))
        self.is_finite = bool(torch.isfinite(torch.stack([v.abs().sum() for v in self._all(self.reference)])).all())

    def suitability(self) -> Suitability:
        """Compare."""
        separate = not self.function.has_company and (self.count == 1 or self._is_separate())
        # Right for the batch as one problem, and, where they are separate, for its examples as many.
        apart = separate and self.count > 1
        layered = self._agrees(lambda: LayerByLayer(self.together))
        layered = layered and (not apart or self._agrees_apart(lambda: LayerByLayer(self.singles)))
        mapped = False
        if not (layered and separate):  # the dearest comparison, and most models do without its answer
            mapped = self._agrees(lambda: ForwardOverReverse(self.together))
            mapped = mapped and (not apart or self._agrees_apart(lambda: ForwardOverReverse(self.singles)))
        return Suitability(layered=layered, mapped=mapped, separate=separate)

    def _is_separate(self) -> bool:
        """Whether examples alone have the products that they have in company."""
        tensors = output_tensors(self.outputs)
        if not tensors or any(o.ndim == 0 or len(o) != self.count for o in tensors):
            return False
        self.apart = self._products(Coupled(self.singles), apart=True)
        return self._agrees_apart(lambda: ReverseOverReverse(self.singles))

    def _products(self, way: Way, *, apart: bool = False) -> tuple[Gradient, Gradient, Tensor]:
        u = self.u[:, None] if apart else self.u[None]
        rows = {n: d[None] for n, d in self.delta.items()}
        gradients = {n: g.sum(0) for n, g in way.gradients().items()} if not apart else {}
        image = way.matvec(rows)
        if not apart:
            # Matching attacks go by the transpose: it must be the same.
            image = torch.stack([image, way.matvec_with_targets(rows)[0]])
        return gradients, way.rmatvec(u), image

    def _agrees(self, make: Callable[[], Way]) -> bool:
        return self._same(make, self.reference, apart=False)

    def _agrees_apart(self, make: Callable[[], Way]) -> bool:
        return self._same(make, self.apart, apart=True)

    def _same(self, make: Callable[[], Way], expected: tuple[Gradient, Gradient, Tensor], *, apart: bool) -> bool:
        try:
            way = make()
            found = self._products(way, apart=apart)
            if getattr(way, "slower", None) is not None:
                return False
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what this way cannot take
            return False
        pairs = list(zip(self._all(found), self._all(expected), strict=True))
        largest = max(float(e.abs().max()) for _, e in pairs if e.numel())
        return all(bool((f - e).norm() <= self.tolerance * (e.norm() + 1e-3 * largest)) for f, e in pairs)

    def _all(self, products: tuple[Gradient, Gradient, Tensor]) -> list[Tensor]:
        gradients, images, image = products
        return [
            *(gradients[n] for n in self.parameters if n in gradients),
            *(images[n] for n in self.parameters),
            image,
        ]


@dataclass(frozen=True)
class _WeighedOutputs:
    """A loss that sees every output, each with a weight of its own, to first and second order."""

    count: int

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        total = torch.zeros(())
        for k, part in enumerate(output_tensors(outputs)):
            weights = _waves(part, 1.1 + 0.1 * k)
            total = total.to(part) + (weights * part + 0.5 * (1.5 + weights) * part * part).sum() / part.numel()
        return total


def _moved(parameter: Tensor) -> Tensor:
    """Near the model's own: at zeros of an initialisation whole layers would have nothing to compare."""
    return parameter + 0.05 * (parameter.abs().mean() + 0.02) * _waves(parameter)


def _waves(like: Tensor, frequency: float = 1.7) -> Tensor:
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return torch.cos(frequency * index + 0.3).reshape(like.shape).to(like)
