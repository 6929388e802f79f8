"""How the gradient moves when the inputs move: `J = d^2 l / dx dtheta` as an operator that is never formed.

`J` maps a perturbation of the gradient to input space, `J^T` a change of the input to the change of the gradient
it causes. Both are derivatives of a gradient, taken by the fastest of three ways that is right for the model
(`gradguard.functional.choice`). `J J^T` acts in input space, which has thousands of elements where parameter space has
millions, so that is where every Krylov method of gradguard works. Source: Zhang et al. 2023 (arXiv 2309.13016),
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.choice import WayName, name_of, way_of
from gradguard.functional.contribution import Contribution, contribution
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.precision import full_precision
from gradguard.functional.problems import Batch, Problems, is_separable_by_class
from gradguard.functional.structures import Rest, map_rest, map_rows, output_tensors, rows_of, with_rows
from gradguard.functional.vectors import Gradient, flatten, unflatten
from gradguard.functional.ways import Way, failures_named
from gradguard.linalg import LinearOperator

#: Outputs of the same examples in other company that differ by more than this share of the largest are coupled.
COMPANY = 1e-3


Product = TypeVar("Product", bound=Callable[..., Any])


def _naming_what_fails(product: Product) -> Product:
    """What a user's model raises in a product becomes an error that names the model and the loss."""

    @wraps(product)
    def wrapped(self: InputJacobian, *arguments: Any, **options: Any) -> Any:
        with failures_named(self.gradient):
            return product(self, *arguments, **options)

    return wrapped  # type: ignore[return-value]


class InputJacobian:
    """`J` at one batch and at the model's present parameters, as an operator.

    Args:
        gradient: The loss gradient whose derivative is taken.
        inputs: `(B, *input_shape)`, or a structure, see `LossGradient.bind`.
        targets: `(B, ...)`.
        per_example: `True` gives `B` independent operators `J_r`, the derivative of the *batch's* gradient by
            example `r` alone: what an attacker faces who knows all the other examples (the worst case). For a mean
            over examples `J_r = (1/B) d^2 l_r / dx_r dtheta`; in general the weight is the one that the loss gives the
            example in this batch (class weights, `ignore_index`, padding, a sum). Where the model or the loss couples
            examples, `J_r` moves the others' terms, too, at the price of a pass through the batch per example. `False`
            gives the joint operator of the whole batch, `B D x P`: the attacker must solve for every example.
        examples: Indices of the examples that the per-example operators are built for (default: all of them).
        chunk_size: Examples at a time, a bound on memory: a few times the activations of a training step with as many
            examples. What is asked of the operator is then computed chunk by chunk. Default: all.
        validate: Check batch and model first (two forward passes).
        way: "layer by layer", "forward over reverse", "reverse over reverse" or "coupled"; default: the fastest that is
            right.

    The operator refers to the model's parameters as they are when it is built; take a new one after an optimiser step.

    Raises:
        InputError: What `LossGradient.check_batch` raises, and for `examples` of a joint operator.
        UnsupportedModelError: The model cannot be differentiated twice; raised by the first product.
    """

    @full_precision()
    def __init__(
        self,
        gradient: LossGradient,
        inputs: Any,
        targets: Any,
        *,
        per_example: bool = True,
        examples: Sequence[int] | None = None,
        chunk_size: int | None = None,
        validate: bool = True,
        way: WayName | None = None,
    ) -> None:
        outputs = gradient.check_batch(inputs, targets) if validate else None
        gradient, inputs, targets = gradient.bind(inputs, targets)
        if examples is not None and not per_example:
            raise InputError("`examples` selects per-example operators; the joint operator is of the whole batch.")
        self.gradient = gradient
        self.batch: tuple[Tensor, Rest] = (gradient.cast(inputs.detach()), gradient.cast(targets))
        self.per_example, self.chunk_size = per_example, chunk_size
        self.parameters = gradient.parameters()
        self._given_way, self._outputs, self._validate = way, outputs, validate
        self._rows: Tensor | None = None
        self._distinct = True
        self.inputs, self.targets = self.batch
        if per_example:
            rows = torch.arange(len(inputs), device=self.inputs.device)
            self._rows = rows if examples is None else rows[list(examples)]
            self.inputs = self.batch[0] if examples is None else self.batch[0][self._rows]
            self.targets = self.batch[1] if examples is None else rows_of(self.batch[1], self._rows)
        # A problem is a group of examples that are unknown together: (R, examples per problem, *input_shape).
        dim = 1 if per_example else 0
        self._inputs, self._targets = self.inputs.unsqueeze(dim), map_rest(lambda t: t.unsqueeze(dim), self.targets)

    @classmethod
    def of_trials(
        cls,
        gradient: LossGradient,
        inputs: Tensor,
        targets: Rest,
        *,
        chunk_size: int | None = None,
        way: WayName | None = None,
    ) -> InputJacobian:
        """`R` joint operators at once, one for each of an attack's trial batches.

        Args:
            gradient: Bound to the batches' structure.
            inputs: `(R, B, *input_shape)`; vectors have this shape.
            targets: `(R, B, ...)`.
            chunk_size: Trials at a time.
            way: As in the constructor.

        Returns:
            The operators.
        """
        self = cls.__new__(cls)
        self.gradient, self.inputs, self.targets = gradient, inputs, targets
        self.batch = (inputs, targets)
        self.per_example, self.chunk_size = True, chunk_size
        self.parameters = gradient.parameters()
        self._inputs, self._targets = inputs, targets
        self._given_way, self._outputs, self._validate, self._rows = way, None, False, None
        self._distinct = True
        return self

    def __repr__(self) -> str:
        kind = "per example" if self.per_example else "joint"
        return f"InputJacobian({kind}, {self.num_problems} x ({self.size} x {self.gradient.num_parameters}))"

    # ------------------------------------------------------------------ shapes

    @property
    def num_problems(self) -> int:
        """`R`: `B` per example, 1 for the joint operator."""
        return len(self._inputs)

    @property
    def size(self) -> int:
        """Input elements per problem: `D` per example, `B D` joint."""
        return self._inputs[0].numel()

    def joint(self) -> InputJacobian:
        """The joint operator of the whole batch."""
        return InputJacobian(self.gradient, *self.batch, per_example=False, validate=False)

    def chunks(self) -> Iterator[tuple[slice, InputJacobian]]:
        """Which problems, and their operator, `chunk_size` at a time: a solver run on each in turn bounds memory."""
        if not self.chunk_size or self.chunk_size >= self.num_problems:
            yield slice(None), self
            return
        for start in range(0, self.num_problems, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            yield rows, self._of(rows)

    def in_dtype(self, dtype: torch.dtype) -> InputJacobian:
        """The same operator computed in `dtype`, at the same parameters and inputs, whatever the model's are by now."""
        if dtype == self.inputs.dtype == self.gradient.computing_dtype:
            return self
        other = self._copy()
        other.gradient = self.gradient.with_dtype(dtype)
        other.parameters = {n: p.to(dtype) for n, p in self.parameters.items()}
        for name in ("inputs", "targets", "_inputs", "_targets"):
            setattr(other, name, other.gradient.cast(getattr(self, name)))
        other.batch = (other.gradient.cast(self.batch[0]), other.gradient.cast(self.batch[1]))
        other._outputs = None
        other.__dict__.pop("_whole", None)
        return other

    # ------------------------------------------------------------------ the way

    @cached_property
    @_naming_what_fails
    def way(self) -> WayName:
        """How products are taken: "layer by layer", "forward over reverse", "reverse over reverse" or "coupled".

        The numbers are the same. The first is several times faster than the second and holds no parameter-sized vector
        per example. The third takes one example at a time.

        Returns:
            The name.
        """
        if self._given_way is not None:
            return self._given_way
        found = name_of(self._problems(slice(None)))
        if found != "coupled" and self._needs_company and self._validate and not self._is_same_in_other_company():
            return "coupled"
        return found

    @property
    def _needs_company(self) -> bool:
        """Whether problems are single examples of a larger batch."""
        return self._rows is not None and len(self.batch[0]) > 1

    @cached_property
    def _whole(self) -> Batch | None:
        """The batch that the problems are examples of, with the model's outputs on it."""
        if not self._needs_company:
            return None
        inputs, rest = self.batch
        if self._outputs is not None:
            return Batch(inputs, rest, self._outputs)
        with torch.no_grad(), full_precision():
            if is_separable_by_class(self.gradient, rest):
                # Only the outputs' shapes matter to such a loss, for examples that are not asked about.
                assert self._rows is not None
                part = self.gradient.outputs(self.parameters, self.inputs, self.targets)
                zeros = map_rows(
                    lambda o: o.new_zeros(len(inputs), *o.shape[1:]).index_copy(0, self._rows, o),  # type: ignore[arg-type]
                    part,
                    len(self.inputs),
                )
                return Batch(inputs, rest, zeros)
            return Batch(inputs, rest, self.gradient.outputs(self.parameters, inputs, rest))

    def _is_same_in_other_company(self) -> bool:
        """Whether the model's outputs for each example are the same when half of the batch is not there."""
        inputs, rest = self.batch
        whole = self._whole
        assert whole is not None
        with torch.no_grad(), full_precision():
            index = torch.arange(len(inputs), device=inputs.device)
            for half in (index[::2], index[1::2]):
                part = self.gradient.outputs(self.parameters, inputs[half], rows_of(rest, half))
                mixed = with_rows(whole.outputs, part, half, len(inputs))
                for alone, company in zip(output_tensors(mixed), output_tensors(whole.outputs), strict=True):
                    if bool((alone - company).abs().max() > COMPANY * company.abs().max()):
                        return False
        return True

    def _problems(self, part: slice | Tensor) -> Problems:
        rows = None if self._rows is None or not self._needs_company else self._rows[part]
        targets = rows_of(self._targets, part)
        return Problems(
            self.gradient, self.parameters, self._inputs[part], targets, self._whole, rows, distinct=self._distinct
        )

    # ------------------------------------------------------------------ products

    @full_precision()
    @_naming_what_fails
    def rmatvec(self, u: Tensor) -> Gradient:
        """`J^T u`: the change of the gradient when the inputs move by `u`.

        Args:
            u: Shape of `inputs`.

        Returns:
            Per parameter `(R, *parameter_shape)` per example (row `r` answers `u_r` alone), `parameter_shape` for the
                joint operator.

        Raises:
            UnsupportedModelError: The model cannot be differentiated twice.
        """
        u = self._grouped(u)
        parts = [point.rmatvec(u[part]) for part, point in self._points()]
        result = parts[0] if len(parts) == 1 else {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        return result if self.per_example else {n: v[0] for n, v in result.items()}

    @full_precision()
    @_naming_what_fails
    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """`J delta`.

        Args:
            delta: One tensor per parameter, shaped as the parameter (the same for every example) or, per example,
                `(R, *parameter_shape)`.

        Returns:
            Shape of `inputs`.

        Raises:
            InputError: `delta` has other names or shapes.
            UnsupportedModelError: The model cannot be differentiated twice.
        """
        self._check_names(delta)
        delta = {n: delta[n].to(p) for n, p in self.parameters.items()}
        shared = all(delta[n].shape == p.shape for n, p in self.parameters.items())
        if not shared:
            for n, p in self.parameters.items():
                if delta[n].shape != (self.num_problems, *p.shape):
                    raise InputError(
                        f"`delta[{n!r}]` has shape {tuple(delta[n].shape)}; it must be {tuple(p.shape)}, or "
                        f"{(self.num_problems, *p.shape)} for one perturbation per example."
                    )
        rows = {n: d[None] if shared else d for n, d in delta.items()}
        points, then = self._points(), self._is_kept
        parts = [point.matvec(rows if shared else _rows(rows, part), then=then) for part, point in points]
        return torch.cat(parts).reshape(self.inputs.shape)

    @full_precision()
    @_naming_what_fails
    def gram(self, u: Tensor) -> Tensor:
        """`J J^T u`. Never holds more than `chunk_size` parameter-sized vectors.

        Args:
            u: Shape of `inputs`.

        Returns:
            Shape of `inputs`.

        Raises:
            UnsupportedModelError: The model cannot be differentiated twice.
        """
        u = self._grouped(u)
        return torch.cat([point.gram(u[part]) for part, point in self._points()]).reshape(self.inputs.shape)

    @full_precision()
    @_naming_what_fails
    def dense(self, *, chunk_size: int | None = 64) -> Tensor:
        """`J` as a matrix, for small inputs: it takes `R * size * P` elements.

        Args:
            chunk_size: Rows at a time, over all problems; `None`: all.

        Returns:
            Shape `(R, size, P)`.

        Raises:
            UnsupportedModelError: The model cannot be differentiated twice.
        """
        basis = torch.eye(self.size, dtype=self.inputs.dtype, device=self.inputs.device)
        directions = basis.reshape(self.size, *self._inputs.shape[1:])
        if self.way in ("layer by layer", "forward over reverse"):
            return self._dense_rows(directions, chunk_size)
        rows = [
            torch.stack([flatten(point.rmatvec(d.expand(part_inputs.shape)), batch_dims=1) for d in directions], dim=1)
            for part, point in self._points()
            for part_inputs in [self._inputs[part]]
        ]
        return torch.cat(rows)

    # ------------------------------------------------------------------ for the solvers, on plain vectors

    def gram_operator(self) -> LinearOperator:
        """`J J^T` on vectors of shape `(R, size)`."""

        def product(u: Tensor) -> Tensor:
            return self.gram(u.reshape(self.inputs.shape)).reshape(u.shape)

        def restrict(rows: Tensor) -> LinearOperator:
            return self._of(rows).gram_operator()

        shape = (self.num_problems, self.size, self.size)
        return LinearOperator(product, product, shape, self.inputs, restrict if self.per_example else None)

    def transpose_operator(self) -> LinearOperator:
        """`J^T` from vectors `(R, size)` to `(R, P)`, and back by `J`."""

        def forward(u: Tensor) -> Tensor:
            images = self.rmatvec(u.reshape(self.inputs.shape))
            return flatten(images, batch_dims=1) if self.per_example else flatten(images)[None]

        def backward(delta: Tensor) -> Tensor:
            vectors = unflatten(delta if self.per_example else delta[0], self.parameters)
            return self.matvec(vectors).reshape(self.num_problems, self.size)

        return LinearOperator(
            forward, backward, (self.num_problems, self.gradient.num_parameters, self.size), self.inputs
        )

    # ------------------------------------------------------------------ other operators and views

    def with_chunk_size(self, chunk_size: int | None) -> InputJacobian:
        """The same operator, computed `chunk_size` problems at a time."""
        other = self._copy()
        other.chunk_size = chunk_size
        return other

    def repeated(self, count: int) -> InputJacobian:
        """Each problem `count` times over, `R count` in all: as many vectors for each go through one product."""
        if count == 1:
            return self
        index = torch.arange(self.num_problems, device=self.inputs.device).repeat_interleave(count)
        if not self.per_example:
            inputs, targets = self._inputs[index], rows_of(self._targets, index)
            many = InputJacobian.of_trials(
                self.gradient, inputs, targets, chunk_size=self.chunk_size, way=self._given_way
            )
            many.parameters = self.parameters
            return many
        other = self._of(index)
        other._distinct = False
        if self._given_way is None:
            del other.way  # several batches at once are asked for more than one
        return other

    @full_precision()
    def contribution(self, examples: Sequence[int]) -> Contribution:
        """What some examples add to the batch's gradient, as a function of them alone: see `Contribution`.

        Args:
            examples: Indices in the batch.

        Returns:
            The function and the share. Costs a gradient or two.

        Raises:
            InputError: The loss gives these examples no weight in this batch, so nothing shows them.
        """
        return contribution(self.gradient, self.parameters, self.batch, list(examples), self._whole, self.way)

    # ------------------------------------------------------------------ inside

    def _of(self, rows: slice | Tensor) -> InputJacobian:
        """The operators of some problems alone."""
        part = self._copy()
        part.way = self.way
        for name in ("inputs", "_inputs"):
            setattr(part, name, getattr(self, name)[rows])
        for name in ("targets", "_targets"):
            setattr(part, name, rows_of(getattr(self, name), rows))
        part._whole = self._whole
        part._rows = None if self._rows is None else self._rows[rows]
        return part

    def _copy(self) -> InputJacobian:
        other = copy(self)
        other.__dict__.pop("_point", None)
        return other

    def _points(self) -> Iterator[tuple[slice, Way]]:
        """The problems, `chunk_size` at a time, each with its way; kept only where there is one chunk."""
        if self._is_kept:
            yield slice(None), self._point
            return
        assert self.chunk_size is not None, "else there is one chunk"
        for start in range(0, self.num_problems, self.chunk_size):
            part = slice(start, start + self.chunk_size)
            yield part, self._way(part)

    @property
    def _is_kept(self) -> bool:
        """Whether one way serves all problems, so that it is kept for the next product."""
        return self.chunk_size is None or self.chunk_size >= self.num_problems

    @cached_property
    def _point(self) -> Way:
        return self._way(slice(None))

    def _way(self, part: slice) -> Way:
        return way_of(self._problems(part), name=self.way, given=self._given_way is not None)

    def _dense_rows(self, directions: Tensor, chunk_size: int | None) -> Tensor:
        """`J` from as many copies of the problems as directions are taken at a time."""
        copies = max(1, min(self.size, (chunk_size or self.size) // self.num_problems))
        index = torch.arange(self.num_problems, device=self.inputs.device)
        copied = replace(self._problems(index.repeat_interleave(copies)), distinct=False)
        name = self._given_way or (name_of(copied) if copied.batch is None else self.way)
        point = way_of(copied, name=name, given=self._given_way is not None)
        rows = []
        for some in directions.split(copies):
            # The last ones are fewer than the copies: the rest of these get zeros.
            u = torch.cat([some, some.new_zeros(copies - len(some), *some.shape[1:])])
            images = flatten(point.rmatvec(u.repeat(self.num_problems, *[1] * (u.ndim - 1))), batch_dims=1)
            rows.append(images.unflatten(0, (self.num_problems, copies))[:, : len(some)])
        return torch.cat(rows, dim=1)

    def _grouped(self, u: Tensor) -> Tensor:
        if u.shape != self.inputs.shape:
            raise InputError(f"`u` must have the inputs' shape {tuple(self.inputs.shape)}, got {tuple(u.shape)}.")
        return u.to(self._inputs.dtype).reshape(self._inputs.shape)

    def _check_names(self, delta: Mapping[str, Tensor]) -> None:
        if set(delta) != set(self.parameters):
            missing, unexpected = set(self.parameters) - set(delta), set(delta) - set(self.parameters)
            raise InputError(
                "`delta` does not name the model's parameters: "
                f"missing {sorted(missing)}, unexpected {sorted(unexpected)}."
            )


def _rows(delta: Gradient, part: slice) -> Gradient:
    return {n: d[part] for n, d in delta.items()}
