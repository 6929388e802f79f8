"""How the gradient moves when the inputs move: `J = d^2 l / dx dtheta` as an operator that is never formed.

`J` maps a perturbation of the gradient to input space, `J^T` a change of the input to the change of the gradient
it causes. Both are derivatives of a gradient: taken layer by layer where the model's layers allow it
(`gradguard.functional.layer_by_layer`), else forward over reverse through `torch.func`. `J J^T` acts in input space,
which has thousands of elements where parameter space has millions, so that is where every Krylov method of gradguard
works. Source: Zhang et al. 2023 (arXiv 2309.13016), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from gradguard.errors import InputError
from gradguard.functional.layer_by_layer import Linearisation, is_bilinear
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.precision import full_precision
from gradguard.functional.remembered import remembered
from gradguard.functional.vectors import Gradient, flatten, unflatten
from gradguard.linalg import LinearOperator


class InputJacobian:
    """`J` at one batch and at the model's present parameters, as an operator.

    `gradient`: the loss gradient whose derivative is taken.
    `inputs`: shape `(B, *input_shape)`; `targets`: shape `(B, ...)`.
    `per_example`: `True` gives `B` independent operators `J_r`, the derivative of the *batch's* gradient by
        example `r` alone: what an attacker faces who knows all the other examples (the worst case). Since the batch
        gradient is a mean, `J_r = (1/B) d^2 l_r / dx_r dtheta`. `False` gives the joint operator of the whole
        batch, `B D x P`: the attacker must solve for every example.
    `examples`: indices of the examples that the per-example operators are built for (default: all of them).
    `chunk_size`: examples at a time, a bound on memory: a few times the activations of a training step with as many
        examples. What is asked of the operator is then computed chunk by chunk. Default: all.
    `validate`: check batch and model first (one forward pass). Raises what `LossGradient.check_batch` raises, and
        `InputError` if `per_example` is asked of a loss that is no mean or sum over examples.

    The operator refers to the model's parameters as they are when it is built; take a new one after an optimiser step.
    """

    def __init__(
        self,
        gradient: LossGradient,
        inputs: Tensor,
        targets: Tensor,
        *,
        per_example: bool = True,
        examples: Sequence[int] | None = None,
        chunk_size: int | None = None,
        validate: bool = True,
    ) -> None:
        if validate:
            gradient.check_batch(inputs, targets)
        if examples is not None and not per_example:
            raise InputError("`examples` selects per-example operators; the joint operator is of the whole batch.")
        self.gradient = gradient
        self.batch = (gradient.cast(inputs.detach()), gradient.cast(targets.detach()))
        self.inputs, self.targets = self.batch if examples is None else (part[list(examples)] for part in self.batch)
        self.per_example = per_example
        self.chunk_size = chunk_size
        self.parameters = gradient.parameters()
        # A problem is a group of examples that are unknown together: (R, examples per problem, *input_shape).
        dim = 1 if per_example else 0
        self._inputs, self._targets = self.inputs.unsqueeze(dim), self.targets.unsqueeze(dim)

    @classmethod
    def of_trials(
        cls, gradient: LossGradient, inputs: Tensor, targets: Tensor, *, chunk_size: int | None = None
    ) -> InputJacobian:
        """`R` joint operators at once, one for each of an attack's trial batches.

        `inputs`: shape `(R, B, *input_shape)`; `targets`: shape `(R, B, ...)`. Vectors have the inputs' shape.
        """
        self = cls.__new__(cls)
        self.gradient, self.inputs, self.targets = gradient, inputs, targets
        self.batch = (inputs, targets)
        self.per_example, self.chunk_size = True, chunk_size
        self.parameters = gradient.parameters()
        self._inputs, self._targets = inputs, targets
        self.example_weight = 1.0
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

    @cached_property
    def example_weight(self) -> float:
        """The weight of one example's loss in the batch's: `1/B` for a mean loss; 1 for a sum and joint."""
        if not self.per_example or len(self.batch[0]) == 1:
            return 1.0
        mean = remembered(self.gradient, "mean", lambda: _is_mean(self.gradient, *self.batch, self.chunk_size))
        return 1.0 / len(self.batch[0]) if mean else 1.0

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
        """The same operator computed in `dtype`, from parameters and inputs as they are."""
        if dtype == self.inputs.dtype == self.gradient.computing_dtype:
            return self
        other = self._copy()
        other.gradient = self.gradient.with_dtype(dtype)
        other.parameters = other.gradient.parameters()
        for name in ("inputs", "targets", "_inputs", "_targets"):
            setattr(other, name, other.gradient.cast(getattr(self, name)))
        other.batch = (other.gradient.cast(self.batch[0]), other.gradient.cast(self.batch[1]))
        return other

    # ------------------------------------------------------------------ products

    @cached_property
    def is_bilinear(self) -> bool:
        """Whether products go layer by layer (`gradguard.functional.layer_by_layer`), else through `torch.func`.

        The answer is the same; the first is several times faster and holds no parameter-sized vector per example.
        """
        return is_bilinear(self.gradient, self._inputs.flatten(0, 1)[:2], self._targets.flatten(0, 1)[:2])

    @full_precision()
    def rmatvec(self, u: Tensor) -> Gradient:
        """`J^T u`: the change of the gradient when the inputs move by `u`.

        `u`: shape of `inputs`. Returns per parameter `(B, *parameter_shape)` per example (row `r` answers `u_r`
        alone), `parameter_shape` for the joint operator.
        """
        u = self._grouped(u)
        if self.is_bilinear:
            parts = [point.rmatvec(u[part]) for part, point in self._points()]
            result = parts[0] if len(parts) == 1 else {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        else:
            result = self._map(self._rmatvec_one)(self._inputs, self._targets, u)
        return result if self.per_example else {n: v[0] for n, v in result.items()}

    @full_precision()
    def matvec(self, delta: Mapping[str, Tensor]) -> Tensor:
        """`J delta`: shape of `inputs`.

        `delta`: one tensor per parameter, shaped as the parameter (the same for every example) or, per example,
        `(B, *parameter_shape)`.
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
        if self.is_bilinear:
            rows = {n: d[None] if shared else d for n, d in delta.items()}
            points, then = self._points(), self._is_kept
            parts = [point.matvec(rows if shared else _rows(rows, part), then=then) for part, point in points]
            return torch.cat(parts).reshape(self.inputs.shape)
        product = vmap(self._matvec_one, in_dims=(0, 0, None if shared else 0), chunk_size=self.chunk_size)
        return product(self._inputs, self._targets, delta).reshape(self.inputs.shape)

    @full_precision()
    def gram(self, u: Tensor) -> Tensor:
        """`J J^T u`: shape of `inputs`. Never holds more than `chunk_size` parameter-sized vectors."""
        u = self._grouped(u)
        if self.is_bilinear:
            return torch.cat([point.gram(u[part]) for part, point in self._points()]).reshape(self.inputs.shape)

        def one(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
            return self._matvec_one(x, y, self._rmatvec_one(x, y, v))

        return self._map(one)(self._inputs, self._targets, u).reshape(self.inputs.shape)

    @full_precision()
    def dense(self, *, chunk_size: int | None = 64) -> Tensor:
        """`J` as a matrix: shape `(R, size, P)`. For small inputs: it takes `R * size * P` elements.

        `chunk_size`: rows at a time, over all problems.
        """
        basis = torch.eye(self.size, dtype=self.inputs.dtype, device=self.inputs.device)
        directions = basis.reshape(self.size, *self._inputs.shape[1:])
        if self.is_bilinear:
            return self._dense_rows(directions, chunk_size)

        def row(direction: Tensor) -> Tensor:
            images = vmap(self._rmatvec_one, in_dims=(0, 0, None))(self._inputs, self._targets, direction)
            return flatten(images, batch_dims=1)

        return vmap(row, out_dims=1, chunk_size=chunk_size)(directions)

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

    # ------------------------------------------------------------------ inside

    def _of(self, rows: slice | Tensor) -> InputJacobian:
        """The operators of some problems alone."""
        part = self._copy()
        for name in ("inputs", "targets", "_inputs", "_targets"):
            setattr(part, name, getattr(self, name)[rows])
        part.example_weight, part.is_bilinear = self.example_weight, self.is_bilinear
        return part

    def _copy(self) -> InputJacobian:
        other = copy(self)
        other.__dict__.pop("_linearisation", None)
        return other

    def _points(self) -> Iterator[tuple[slice, Linearisation]]:
        """The problems, `chunk_size` at a time, each with its linearisation; kept only where there is one chunk."""
        if self._is_kept:
            yield slice(None), self._linearisation
            return
        assert self.chunk_size is not None, "else there is one chunk"
        for start in range(0, self.num_problems, self.chunk_size):
            part = slice(start, start + self.chunk_size)
            yield part, self._linearised(part)

    @property
    def _is_kept(self) -> bool:
        """Whether one linearisation serves all problems, so that it is kept for the next product."""
        return self.chunk_size is None or self.chunk_size >= self.num_problems

    @cached_property
    def _linearisation(self) -> Linearisation:
        return self._linearised(slice(None))

    def _dense_rows(self, directions: Tensor, chunk_size: int | None) -> Tensor:
        """`J` from the linearisation of as many copies of the problems as directions are taken at a time."""
        copies = max(1, min(self.size, (chunk_size or self.size) // self.num_problems))
        inputs, targets = (part.repeat_interleave(copies, dim=0) for part in (self._inputs, self._targets))
        point = Linearisation(self.gradient, self.parameters, inputs, targets, self.example_weight)
        rows = []
        for some in directions.split(copies):
            # The last ones are fewer than the copies: the rest of these get zeros.
            u = torch.cat([some, some.new_zeros(copies - len(some), *some.shape[1:])])
            images = flatten(point.rmatvec(u.repeat(self.num_problems, *[1] * (u.ndim - 1))), batch_dims=1)
            rows.append(images.unflatten(0, (self.num_problems, copies))[:, : len(some)])
        return torch.cat(rows, dim=1)

    def _linearised(self, part: slice) -> Linearisation:
        inputs, targets = self._inputs[part], self._targets[part]
        return Linearisation(self.gradient, self.parameters, inputs, targets, self.example_weight)

    def _loss(self, parameters: Gradient, x: Tensor, y: Tensor) -> Tensor:
        return self.example_weight * self.gradient.loss(parameters, x, y)

    def _rmatvec_one(self, x: Tensor, y: Tensor, u: Tensor) -> Gradient:
        return jvp(lambda z: grad(self._loss)(self.parameters, z, y), (x,), (u,))[1]

    def _matvec_one(self, x: Tensor, y: Tensor, delta: Gradient) -> Tensor:
        return jvp(lambda p: grad(self._loss, argnums=1)(p, x, y), (self.parameters,), (delta,))[1]

    def _map(self, function):
        return vmap(function, chunk_size=self.chunk_size)

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


def _is_mean(gradient: LossGradient, inputs: Tensor, targets: Tensor, chunk_size: int | None) -> bool:
    """Whether the batch's loss is the mean of its examples' (else their sum); anything else is refused."""
    if gradient.computing_dtype.itemsize < 4:
        gradient = gradient.with_dtype(torch.float32)  # rounding would pass for a difference
    parameters, inputs, targets = gradient.parameters(), gradient.cast(inputs), gradient.cast(targets)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return gradient.loss(parameters, x[None], y[None])

    with torch.no_grad():
        total = gradient.loss(parameters, inputs, targets).double()
        each = vmap(one, chunk_size=chunk_size)(inputs, targets).double()
    tolerance = 1e-3 * each.abs().mean() + 1e-6
    if (total - each.mean()).abs() <= tolerance:
        return True
    if (total - each.sum()).abs() <= tolerance * len(inputs):
        return False
    raise InputError(
        f"The batch's loss ({total.item():.6g}) is neither the mean ({each.mean().item():.6g}) nor the sum "
        f"({each.sum().item():.6g}) of the examples' own: the loss or the model mixes examples (class weights, "
        "contrastive terms, batch statistics). Use `per_example=False`, which measures the batch as a whole."
    )
