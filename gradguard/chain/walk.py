"""From a model to its chain of steps, by symbolic tracing."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradguard.chain.activation import Shape
from gradguard.chain.residual import folded
from gradguard.chain.sequence import Chain, Graph, all_parameters
from gradguard.chain.tracing import WAY_OUT, name_of, unwrapped
from gradguard.chain.walker import Walker
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.remembered import remembered


def walk(gradient: LossGradient, input_shape: Sequence[int], *, residual: bool = False) -> Chain:
    """A model as a chain of steps. Costs a symbolic trace and two forward passes of one example.

    Activations that are not one-to-one are links too; see `Chain.check_invertible`.

    Args:
        gradient: The model and its loss.
        input_shape: Of one example, without the batch dimension.
        residual: Sums of two paths are links too, as `Residual` steps.

    Returns:
        The chain.

    Raises:
        UnsupportedModelError: Naming the module (or the call in a `forward`) that is not a link of a chain.
        InputError: If `input_shape` does not fit the model.
    """
    check_walkable(gradient.model)
    shape = checked_shape(input_shape)

    def find() -> Chain:
        walker = Walker(gradient, shape, branches=residual, maxima=False)
        return folded(Graph(walker.steps(), tuple(walker.sources), shape))

    chain = remembered(gradient, ("chain", shape, residual), find)
    try:
        _check_same_function(gradient, chain)
    except UnsupportedModelError:
        chain = find()  # a module's attribute may have been changed since
        _check_same_function(gradient, chain)
    return chain


def walk_graph(gradient: LossGradient, input_shape: Sequence[int]) -> Graph:
    """As `walk`, but values may be used twice and summed (residual blocks), and maximum pooling is a step as well.

    What the recursion cannot go through and a rank analysis can still speak about.

    Args:
        gradient: The model and its loss.
        input_shape: Of one example, without the batch dimension.

    Returns:
        The graph.
    """
    check_walkable(gradient.model)
    walker = Walker(gradient, checked_shape(input_shape), branches=True, maxima=True)
    graph = Graph(walker.steps(), tuple(walker.sources), walker.input_shape)
    _check_same_function(gradient, graph)
    return graph


def checked_shape(input_shape: Sequence[int]) -> Shape:
    """`input_shape` as a tuple. Raises `InputError` for anything but positive whole numbers."""
    try:
        shape = tuple(operator.index(n) for n in input_shape)
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(
            f"`input_shape` must be the shape of one example, such as (3, 32, 32), or (64,) for a vector; got "
            f"{input_shape!r}."
        )
    return shape


def check_walkable(model: nn.Module) -> None:
    """Raises `InputError` for what has no values to walk: no module, uninitialised, complex or meta parameters."""
    if not isinstance(model, nn.Module):
        raise InputError(f"`model` must be an nn.Module, got {type(model).__name__}. Wrap a function in a module.")
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"Parameter {name!r} is not initialised yet. Run the model on one batch first.")
        if parameter.is_complex():
            raise UnsupportedModelError(f"Parameter {name!r} is complex. {WAY_OUT}")
        if parameter.is_meta:
            raise InputError(f"Parameter {name!r} is on the meta device and has no values. Load the model first.")


def _check_same_function(gradient: LossGradient, chain: Chain | Graph) -> None:
    """A hook is invisible to the trace: compare values once instead of trusting it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(chain.input_shape, generator=generator, dtype=torch.float64)
    x = x.to(gradient.device, gradient.computing_dtype).requires_grad_()
    with torch.enable_grad():
        try:
            expected = gradient.outputs(gradient.parameters(), x[None].clone())[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a user's forward may raise anything
            raise InputError(
                f"{name_of(gradient.model)} fails on one example of shape {chain.input_shape}: {error}"
            ) from error
        found = chain(x, all_parameters(gradient))
    if not _alike(found, expected):
        raise UnsupportedModelError(
            f"{name_of(gradient.model)} computes something else than its layers one after another: a forward hook "
            "changes values, or a layer has been patched. Remove the hook, or write the model as nn.Sequential."
        )
    direction = torch.rand(expected.shape, generator=generator, dtype=torch.float64).to(x)
    try:
        slope = _slope(expected, x, direction)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # checkpoints recompute their part with other tensors
        raise UnsupportedModelError(
            f"{name_of(gradient.model)} has no derivative to compare with that of its layers (checkpointing?): "
            f"{str(error).splitlines()[0]} Switch that off, or attack by gradient matching."
        ) from error
    if not _alike(_slope(found, x, direction), slope):
        raise UnsupportedModelError(
            f"{name_of(gradient.model)} has the values of its layers one after another, and another derivative: a "
            "custom autograd.Function, a `detach`, or a hook on gradients. Remove it, or attack by gradient matching."
        )


def _slope(value: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of `value` by `x` along `direction`; zero where nothing leads there."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (slope,) = torch.autograd.grad(value, x, direction, allow_unused=True)
    return torch.zeros_like(x) if slope is None else slope


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether values are equal up to rounding."""
    if found.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.detach().abs().max())
    return torch.allclose(found, expected, rtol=0, atol=tolerance)


__all__ = ["check_walkable", "checked_shape", "unwrapped", "walk", "walk_graph"]
