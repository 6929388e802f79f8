"""The general ways to products with the Jacobian: forward over reverse, reverse over reverse, and coupled.

`J^T u = d/de grad_theta l(x + e u) = grad_theta <grad_x l, u>` and `J delta = grad_x <grad_theta l, delta>`. The first
form is forward over reverse (`torch.func`: all problems at once); the second is reverse over reverse, plain autograd
twice, which takes whatever can be differentiated twice, one problem at a time. A batch whose examples are coupled
(batch statistics, contrastive losses) is the second with all examples in one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient, differentiable, graph_nodes
from gradguard.functional.problems import Problems
from gradguard.functional.structures import Rest, rows_of, targets_of
from gradguard.functional.vectors import Gradient

Product = TypeVar("Product", bound=Callable[..., Any])


@contextmanager
def failures_named(function: LossGradient) -> Iterator[None]:
    """What a user's model or loss raises within becomes an `UnsupportedModelError` that names both."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{type(function.model).__name__} with {function.loss_fn} cannot be differentiated twice: {said}. Replace "
            "the layer or the loss that has no second derivative."
        ) from error


class Way(Protocol):
    """Products with the Jacobians of `R` problems of `n` examples each.

    `delta` has one row per problem, `(R, *parameter_shape)`, or one for all, `(1, *parameter_shape)`.
    """

    def gradients(self) -> Gradient:
        """Each problem's gradient: `(R, *parameter_shape)`."""

    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_r^T u_r` for `u` `(R, n, *input_shape)`: `(R, *parameter_shape)`."""

    def matvec(self, delta: Mapping[str, Tensor], *, then: bool = False) -> Tensor:
        """`J_r delta_r`: `(R, n, *input_shape)`. `then`: other products follow."""

    def matvec_with_targets(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same, and the derivative of `<delta_r, gradient_r>` by soft targets, `None` where they are fixed."""

    def gram(self, u: Tensor) -> Tensor:
        """`J_r J_r^T u_r`: `(R, n, *input_shape)`."""


def _else_one_by_one(product: Product) -> Product:
    """A product that `torch.func` cannot take with this loss is taken by plain autograd."""

    @wraps(product)
    def wrapped(self: ForwardOverReverse, *arguments: Any, **options: Any) -> Any:
        if self.slower is None:
            try:
                return product(self, *arguments, **options)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                self.slower = ReverseOverReverse(self.problems, with_targets=self.with_targets)
        return getattr(self.slower, product.__name__)(*arguments, **options)

    return wrapped  # type: ignore[return-value]


class ForwardOverReverse:
    """All problems at once through `torch.func`. What that cannot take goes to `slower`, once it is found out.

    Args:
        problems: At one point.
        with_targets: Products by soft targets follow, too.
    """

    def __init__(self, problems: Problems, *, with_targets: bool = False) -> None:
        self.problems, self.with_targets = problems, with_targets
        self.slower: ReverseOverReverse | None = None

    @_else_one_by_one
    def gradients(self) -> Gradient:
        """Each problem's gradient: `(R, *parameter_shape)`."""
        p = self.problems
        with differentiable():
            own = vmap(grad(p.loss), in_dims=(None, 0, 0, 0))(p.parameters, p.inputs, p.rest, p.row_or_zero)
        return _materialised(own)

    @_else_one_by_one
    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_r^T u_r`."""
        p = self.problems

        def one(x: Tensor, rest: Rest, row: Tensor, v: Tensor) -> Gradient:
            return jvp(lambda z: grad(p.loss)(p.parameters, z, rest, row), (x,), (v,))[1]

        with differentiable():
            return _materialised(vmap(one)(p.inputs, p.rest, p.row_or_zero, u))

    @_else_one_by_one
    def matvec(self, delta: Mapping[str, Tensor], *, then: bool = False) -> Tensor:
        """`J_r delta_r`."""
        p = self.problems
        shared = len(next(iter(delta.values()))) == 1
        rows = {n: d[0] for n, d in delta.items()} if shared else dict(delta)

        def one(x: Tensor, rest: Rest, row: Tensor, change: Gradient) -> Tensor:
            return self._matvec_one(x, rest, row, change)

        with differentiable():
            return vmap(one, in_dims=(0, 0, 0, None if shared else 0))(p.inputs, p.rest, p.row_or_zero, rows)

    @_else_one_by_one
    def matvec_with_targets(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The transpose of the gradient's derivative, problem by problem under one map.

        Not the map's own transpose: PyTorch's `vjp(vmap(grad))` loses a part of the derivative through the weight of a
        normalisation (seen with LayerNorm, InstanceNorm and BatchNorm in torch 2.13).

        Args:
            delta: One row per problem, `(R, *parameter_shape)`.

        Returns:
            `(R, n, *input_shape)`, and the derivative of `<delta_r, gradient_r>` by soft targets, `None` where they are
                fixed.
        """
        p = self.problems

        def one(x: Tensor, rest: Rest, row: Tensor, change: Gradient) -> tuple[Tensor, ...]:
            if self.with_targets:
                return vjp(lambda z, y: grad(p.loss)(p.parameters, z, y, row), x, rest)[1](change)
            return vjp(lambda z: grad(p.loss)(p.parameters, z, rest, row), x)[1](change)

        with differentiable():
            found = vmap(one)(p.inputs, p.rest, p.row_or_zero, dict(delta))
        return found[0], found[1] if self.with_targets else None

    @_else_one_by_one
    def gram(self, u: Tensor) -> Tensor:
        """`J_r J_r^T u_r`, no parameter-sized vector outside the map."""
        p = self.problems

        def one(x: Tensor, rest: Rest, row: Tensor, v: Tensor) -> Tensor:
            image = jvp(lambda z: grad(p.loss)(p.parameters, z, rest, row), (x,), (v,))[1]
            return self._matvec_one(x, rest, row, image)

        with differentiable():
            return vmap(one)(p.inputs, p.rest, p.row_or_zero, u)

    def _matvec_one(self, x: Tensor, rest: Rest, row: Tensor, change: Gradient) -> Tensor:
        p = self.problems
        return jvp(lambda q: grad(p.loss, argnums=1)(q, x, rest, row), (p.parameters,), (change,))[1]


class _Graph:
    """One loss, its slopes by inputs and by parameters as graphs, and products with either."""

    def __init__(self, problems: Problems, inputs: Tensor, rest: Rest, row: Tensor | None, with_targets: bool) -> None:
        with twice(problems.function.model):
            self.x = inputs.detach().clone().requires_grad_(True)
            self.targets = targets_of(rest) if with_targets else None
            if self.targets is not None:
                self.targets = rest = self.targets.detach().clone().requires_grad_(True)
            self.leaves = {n: p.detach().requires_grad_(True) for n, p in problems.parameters.items()}
            function = problems.function
            if row is None:
                loss = function.loss(self.leaves, self.x, rest)
            else:
                loss = problems.loss(self.leaves, self.x, rest, row)
            variables = [self.x, *self.leaves.values()]
            slopes = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
            self.by_x, self.by_parameters = slopes[0], dict(zip(self.leaves, slopes[1:], strict=True))
            _check_twice_differentiable(slopes)

    def transposed(self, u: Tensor) -> Gradient:
        """`grad_theta <grad_x l, u>`."""
        found = self._grad([self.by_x], list(self.leaves.values()), [u])
        return dict(zip(self.leaves, found, strict=True))

    def forward(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`grad_x <grad_theta l, delta>`, and by the targets."""
        wanted = [self.x] if self.targets is None else [self.x, self.targets]
        found = self._grad(list(self.by_parameters.values()), wanted, [delta[n] for n in self.by_parameters])
        return found[0], found[1] if self.targets is not None else None

    def _grad(self, outputs: list[Tensor], variables: list[Tensor], vectors: list[Tensor]) -> tuple[Tensor, ...]:
        moving = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
        if not moving:
            return tuple(torch.zeros_like(v) for v in variables)
        slopes, weights = zip(*moving, strict=True)
        return torch.autograd.grad(slopes, variables, weights, retain_graph=True, materialize_grads=True)


def _check_twice_differentiable(slopes: tuple[Tensor, ...]) -> None:
    """Raises for a backward that only says that it cannot be differentiated: autograd passes it by in silence."""
    for node in graph_nodes(slopes):
        if "Error" in node.name():
            raise RuntimeError("a function that is `once_differentiable` is in the model")


class ReverseOverReverse:
    """Plain autograd twice, one problem at a time.

    Args:
        problems: At one point.
        with_targets: Products by soft targets follow, too.
    """

    def __init__(self, problems: Problems, *, with_targets: bool = False) -> None:
        self.problems, self.with_targets = problems, with_targets
        self._kept: list[_Graph] | None = None

    @property
    def _graphs(self) -> list[_Graph]:
        if self._kept is None:
            p = self.problems
            rows = p.rows if p.rows is not None else [None] * len(p)
            parts = zip(p.inputs, rows, strict=True)
            self._kept = [_Graph(p, x, rows_of(p.rest, r), row, self.with_targets) for r, (x, row) in enumerate(parts)]
        return self._kept

    def gradients(self) -> Gradient:
        """Each problem's gradient."""
        return _stacked([{n: s.detach() for n, s in g.by_parameters.items()} for g in self._graphs])

    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_r^T u_r`."""
        return _stacked([g.transposed(v) for g, v in zip(self._graphs, u, strict=True)])

    def matvec(self, delta: Mapping[str, Tensor], *, then: bool = False) -> Tensor:
        """`J_r delta_r`."""
        return torch.stack([g.forward(d)[0] for g, d in zip(self._graphs, self._rows(delta), strict=True)])

    def matvec_with_targets(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same, and by the targets."""
        found = [g.forward(d) for g, d in zip(self._graphs, self._rows(delta), strict=True)]
        by_targets = [t for _, t in found if t is not None]
        return torch.stack([x for x, _ in found]), torch.stack(by_targets) if by_targets else None

    def gram(self, u: Tensor) -> Tensor:
        """`J_r J_r^T u_r`, one parameter-sized vector at a time."""
        return torch.stack([g.forward(g.transposed(v))[0] for g, v in zip(self._graphs, u, strict=True)])

    def _rows(self, delta: Mapping[str, Tensor]) -> list[Gradient]:
        shared = len(next(iter(delta.values()))) == 1
        return [{n: d[0 if shared else r] for n, d in delta.items()} for r in range(len(self.problems))]


class Coupled:
    """Examples of a batch whose model or loss couples them: every product is one of the whole batch.

    The price: `J^T u` and `J J^T u` take a pass through the batch for each example, `J delta` one for all.

    Args:
        problems: Single examples of one batch.
    """

    def __init__(self, problems: Problems) -> None:
        assert problems.batch is not None, "only a batch couples examples"
        assert problems.rows is not None
        self.problems, self.batch, self.rows = problems, problems.batch, problems.rows.tolist()
        self._kept: _Graph | None = None

    @property
    def _graph(self) -> _Graph:
        if self._kept is None:
            self._kept = _Graph(self.problems, self.batch.inputs, self.batch.rest, None, False)
        return self._kept

    def gradients(self) -> Gradient:
        """The batch's gradient, the same for each: it is of all of them."""
        return {n: s.detach().expand(len(self.rows), *s.shape) for n, s in self._graph.by_parameters.items()}

    def rmatvec(self, u: Tensor) -> Gradient:
        """`J_r^T u_r`: the move of the whole batch's gradient when one example moves."""
        return _stacked([self._graph.transposed(self._placed(v, row)) for v, row in zip(u, self.rows, strict=True)])

    def matvec(self, delta: Mapping[str, Tensor], *, then: bool = False) -> Tensor:
        """`J_r delta_r`: the examples' rows of the batch's product."""
        if len(next(iter(delta.values()))) == 1:
            image = self._graph.forward({n: d[0] for n, d in delta.items()})[0]
            return image[self.rows][:, None]
        images = [self._graph.forward({n: d[r] for n, d in delta.items()})[0][row] for r, row in enumerate(self.rows)]
        return torch.stack(images)[:, None]

    def matvec_with_targets(self, delta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The same; the targets are fixed."""
        return self.matvec(delta), None

    def gram(self, u: Tensor) -> Tensor:
        """`J_r J_r^T u_r`."""
        images = [
            self._graph.forward(self._graph.transposed(self._placed(v, row)))[0][row]
            for v, row in zip(u, self.rows, strict=True)
        ]
        return torch.stack(images)[:, None]

    def _placed(self, v: Tensor, row: int) -> Tensor:
        whole = torch.zeros_like(self.batch.inputs)
        whole[row] = v[0]
        return whole


def twice(model: nn.Module) -> ExitStack:
    """For plain autograd twice: no fused attention, and no cuDNN for recurrent layers, whose kernels stop at one."""
    stack = ExitStack()
    stack.enter_context(differentiable())
    if any(isinstance(module, nn.RNNBase) for module in model.modules()) and torch.backends.cudnn.is_available():
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    return stack


def _materialised(gradient: Gradient) -> Gradient:
    """`torch.func` gives zeros that hold no memory where nothing moves; they cannot be written to."""
    return {n: g.clone() if g._is_zerotensor() else g for n, g in gradient.items()}


def _stacked(gradients: list[Gradient]) -> Gradient:
    return {n: torch.stack([g[n] for g in gradients]) for n in gradients[0]}
