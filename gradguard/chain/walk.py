"""From a model to its chain of steps, by symbolic tracing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from gradguard.chain import links
from gradguard.chain.activation import Shape
from gradguard.chain.residual import folded
from gradguard.chain.rewiring import Rewire, rewired
from gradguard.chain.sequence import Chain, Graph, all_parameters
from gradguard.chain.steps import (
    Affine,
    ChannelScale,
    MaxPool,
    MeanPool,
    Reshape,
    Step,
    Sum,
    Tail,
)
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.remembered import remembered

_WAY_OUT = (
    "R-GAP walks Linear, Conv2d, elementwise activations, batch normalisation in eval mode, average pooling, reshapes, "
    "padding and normalisation by constants, one after another; attack other models by gradient matching."
)

#: Where wrappers keep the module.
_WRAPPED = ("_orig_mod", "module", "_forward_module", "_original_module")


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
    shape = _checked(input_shape)

    def find() -> Chain:
        walker = _Walker(gradient, shape, branches=residual, maxima=False)
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
    walker = _Walker(gradient, _checked(input_shape), branches=True, maxima=True)
    graph = Graph(walker.steps(), tuple(walker.sources), walker.input_shape)
    _check_same_function(gradient, graph)
    return graph


def _checked(input_shape: Sequence[int]) -> Shape:
    shape = tuple(int(n) for n in input_shape)
    if not shape or min(shape) < 1:
        raise InputError(f"`input_shape` must be the shape of one example, such as (3, 32, 32), got {shape}.")
    return shape


def _check_same_function(gradient: LossGradient, chain: Chain | Graph) -> None:
    """A hook is invisible to the trace: compare values once instead of trusting it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(chain.input_shape, generator=generator, dtype=torch.float64)
    x = x.to(gradient.device, gradient.computing_dtype)
    with torch.no_grad():
        expected = gradient.outputs(gradient.parameters(), x[None])[0]
        found = chain(x, all_parameters(gradient))
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    scale = float(expected.abs().max())
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=tolerance * scale):
        raise UnsupportedModelError(
            f"{_name(gradient.model)} computes something else than its layers one after another: a forward hook "
            "changes values, or a layer has been patched. Remove the hook, or write the model as nn.Sequential."
        )


class _Walker:
    """One pass over the traced graph. Values are tensors on the meta device, with a batch of two, or plain numbers."""

    def __init__(self, gradient: LossGradient, input_shape: Shape, *, branches: bool, maxima: bool) -> None:
        self.gradient = gradient
        self.branches, self.maxima = branches, maxima
        self.model = gradient.model
        # A model that is one layer has no submodule to call; fx would trace into the layer itself.
        body = unwrapped(self.model)
        self.single = fx.Tracer().is_leaf_module(body, "")
        self.root = nn.Sequential(body) if self.single else body
        self.input_shape = input_shape
        self.constants = all_parameters(gradient.with_dtype(torch.float64))
        self.names = {id(p): n for n, p in (*self.model.named_parameters(), *self.model.named_buffers())}
        self.owners: dict[str, str] = {}
        self.trained: set[fx.Node] = set()  # values that depend on trained parameters alone
        self.found: list[Step | MaxPool | Sum] = []
        self.sources: list[tuple[int, ...]] = []
        self.places: dict[fx.Node, int] = {}  # the step that a node's value comes from, -1 for the input
        self.values: dict[fx.Node, Any] = {}
        self.current: fx.Node | None = None
        self._before: tuple[int, ...] | None = None  # the sources of a step that the next one takes in

    def steps(self) -> tuple[Step | MaxPool | Sum, ...]:
        """Every step, first to last."""
        self._walk()
        self._check_end()
        if not any(isinstance(step, Affine) for step in self.found):
            raise UnsupportedModelError(f"{_name(self.model)} has no Linear or Conv2d layer. {_WAY_OUT}")
        return tuple(self.found)

    def _walk(self) -> None:
        for node in _nodes(self.root, self.model):
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op != "output":
                self._call(node)
            elif node.args[0] is not self.current:
                raise UnsupportedModelError(
                    f"{_name(self.model)} returns something else than the value of its last layer. {_WAY_OUT}"
                )

    def _attribute(self, node: fx.Node) -> Any:
        """What `forward` reads off a module: in float64, as the model is computed, if it is a parameter or buffer."""
        value = operator.attrgetter(str(node.target))(self.root)
        name = self.names.get(id(value))
        if name is None:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            self.trained.add(node)
        return self.constants[name]

    def _check_end(self) -> None:
        """Raises `UnsupportedModelError` for values that are scaled or moved behind the last layer."""
        for step in reversed(self.found):
            if isinstance(step, Affine):
                break
            if isinstance(step, Rewire):
                raise UnsupportedModelError(
                    f"{step.name!r} ({step.kind}) scales or moves values behind the last layer. Leave it to the loss. "
                    f"{_WAY_OUT}"
                )

    def _placeholder(self, node: fx.Node) -> None:
        if self.current is None:
            self.current, self.places[node] = node, -1
            self.values[node] = self._meta(self.input_shape)
        elif node.args:
            self.values[node] = node.args[0]
        else:
            raise UnsupportedModelError(f"{_name(self.model)} takes more than one input ({node.target!r}). {_WAY_OUT}")

    def _call(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if n in self.places]
        if node.op == "call_method" and node.target in links.LIKE_METHODS and self._constant_like(node):
            return
        if not sources or _is_shape_query(node):
            self.values[node] = self._evaluate(node)
            if _attribute_of(node) == "device":
                self.values[node] = self.gradient.device  # values here are on the meta device
            if self.trained & set(node.all_input_nodes):
                self.trained.add(node)
            return
        if self.branches and len(sources) == 2 and node.target in links.ADD_CALLS:
            self._add(Sum(name=self._path(node), input_shape=self._shape, output_shape=self._sum_shape(node)), node)
            return
        if self.branches and len(sources) == 1:
            self.current = sources[0]
        if sources != [self.current]:
            why = links.REFUSED_CALLS.get(
                node.target, "takes more than the value of the step before it (a branch or a skip)"
            )
            raise self._refusal(node, why)
        step = self._module_step(node) if node.op == "call_module" else self._function_step(node)
        if step is not None:
            if isinstance(step, Affine):
                self._check_no_tail(step)
            self._add(self._merged(step, node), node)
        else:
            self.values[node], self.places[node] = self.values[sources[0]], self.places[sources[0]]
            self.current = node

    def _add(self, step: Step | MaxPool | Sum, node: fx.Node) -> None:
        """`step` computes the value of `node`."""
        self.found.append(step)
        sources = tuple(self.places[n] for n in node.all_input_nodes if n in self.places)
        self.sources.append(sources if self._before is None else self._before)
        self._before = None
        self.values[node] = self._meta(step.output_shape)
        self.places[node], self.current = len(self.found) - 1, node

    def _constant_like(self, node: fx.Node) -> bool:
        """Take in a constant of the kind of the chain's value, `mean.to(x)` or `x.new_tensor(mean)`, if it is one."""
        first, *others = node.args
        if isinstance(first, fx.Node) and first in self.places:
            if not str(node.target).startswith("new_"):
                return False
            like = torch.zeros((), dtype=torch.float64, device=self.gradient.device)
            args, kwargs = fx.node.map_arg((tuple(others), node.kwargs), lambda n: self.values[n])
            self.values[node] = getattr(like, str(node.target))(*args, **kwargs)
            return True
        if any(n in self.places for n in node.all_input_nodes):
            self.values[node] = self.values[first].to(torch.float64)
            return True
        return False

    def _merged(self, step: Step | MaxPool, node: fx.Node) -> Step | MaxPool:
        """`step` with a rewiring right before it taken in: two of them as one, padding as part of a convolution."""
        (source,) = (n for n in node.all_input_nodes if n in self.places)
        place = self.places[source]
        before = self.found[place] if place >= 0 else None
        if not isinstance(before, Rewire) or place < len(self.found) - 1 or not self._used_once(place):
            return step
        if isinstance(step, Rewire):
            self.found.pop()
            self._before = self.sources.pop()
            return step.after(before)
        apart = before.as_padding() if isinstance(step, Affine) and step.kind == "Conv2d" else None
        if apart is None or not isinstance(step, Affine):
            return step
        scale, padding = apart
        if scale is None:
            self.found.pop()
            self._before = self.sources.pop()
        else:
            self.found[place] = scale
        return replace(step, input_shape=before.input_shape, before=padding)

    def _used_once(self, place: int) -> bool:
        """Whether the value of step `place` goes one way only; what asks for its shape does not count."""
        names = [n for n, p in self.places.items() if p == place]
        return all(sum(not _is_shape_query(user) for user in n.users) <= 1 for n in names)

    def _sum_shape(self, node: fx.Node) -> Shape:
        value = self._evaluate(node)
        shapes = {tuple(self.values[n].shape) for n in node.all_input_nodes}
        if len(node.args) != 2 or node.kwargs or shapes != {tuple(value.shape)}:
            raise self._refusal(node, "adds values of different shapes, or scaled ones")
        return tuple(value.shape[1:])

    def _check_no_tail(self, layer: Affine) -> None:
        for step in self.found:
            if isinstance(step, Tail):
                raise UnsupportedModelError(
                    f"Module {step.name!r} ({step.kind}) comes before layer {layer.name!r}; a softmax can only come "
                    f"last. {_WAY_OUT}"
                )

    # ------------------------------------------------------------------ steps; None for one that does nothing

    def _module_step(self, node: fx.Node) -> Step | MaxPool | None:
        name, module, kind = self._path(node), self._module(node), type(self._module(node))
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            return self._linear(name, module)
        if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
            return self._conv(name, module)
        if kind in links.ACTIVATION_MODULES:
            return replace(links.ACTIVATION_MODULES[kind](module), name=name, input_shape=self._shape)
        if kind in (nn.Flatten, nn.Unflatten):
            return self._reshape(node)
        if kind is nn.Identity:
            return None
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._channel_scale(node, name, module)
        if kind in links.MEAN_MODULES or (self.maxima and kind in links.MAX_MODULES):
            return self._pool(node, module)
        if kind in links.TAIL_MODULES:
            return self._tail(node, kind.__name__, links.TAIL_MODULES[kind], dim=module.dim)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if not module.training or module.p == 0 or self.gradient.train_mode == "eval":
                return None
            raise self._refusal(node, "is in training mode and drops values at random. Call `model.eval()` first")
        return self._rewired(node, module, links.why_refused(module))

    def _function_step(self, node: fx.Node) -> Step | MaxPool | None:
        target = node.target
        if target in links.RESHAPE_CALLS:
            return self._reshape(node)
        if target in links.ACTIVATION_CALLS:
            activation = self._build(node, links.ACTIVATION_CALLS[target], *node.args[1:], **node.kwargs)
            return replace(activation, name=self._path(node), input_shape=self._shape)
        if target in links.TAIL_CALLS:
            return self._tail(node, _call_name(node), links.TAIL_CALLS[target], *node.args[1:], **node.kwargs)
        if target in links.MEAN_CALLS or (self.maxima and target in links.MAX_CALLS):
            return self._pool(node, self._call_alone(node))
        if target in (F.dropout, torch.dropout):
            options = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
            if options.get("training", True) is False or options.get("p", 0.5) == 0:
                return None
            raise self._refusal(node, "drops values at random. Call `model.eval()` first")
        return self._rewired(node, self._call_alone(node), links.REFUSED_CALLS.get(target))

    def _rewired(self, node: fx.Node, function: Any, why: str | None) -> Rewire:
        """A step that only scales, shifts and moves values, if that is what `function` of a batch does.

        `why`: what is said of it otherwise.
        """
        trained = self.trained & set(node.all_input_nodes)
        if isinstance(function, nn.Module):
            trained = trained or any(True for _ in function.parameters())
            function = self._pure(function)
        elif why is not None and node.target not in links.ADD_CALLS:
            raise self._refusal(node, why)
        if trained:
            raise self._refusal(
                node, why or "computes with a trained parameter outside of a layer. Use nn.BatchNorm2d for that"
            )
        kind = _name(self._module(node)) if node.op == "call_module" else _call_name(node)
        step = rewired(function, self._path(node), kind, self._shape, self.gradient.device)
        if isinstance(step, str):
            raise self._refusal(node, why or f"is no link of a chain of layers: it {step}")
        return step

    def _pure(self, module: nn.Module) -> Any:
        """`module` in float64 as a function of a batch; nothing in it changes."""
        buffers = {n: self.constants[self.names[id(b)]].clone() for n, b in module.named_buffers()}
        return lambda x: functional_call(module, buffers, (x,))

    def _build(self, node: fx.Node, builder: Any, *args: Any, **kwargs: Any) -> Any:
        """`builder` with the arguments of the call after the first, which is the chain's value."""
        try:
            return builder(None, *args, **{n: v for n, v in kwargs.items() if n != "input"})
        except TypeError as error:
            raise self._refusal(node, f"is called with arguments that are not known ({error})") from error

    def _tail(self, node: fx.Node, kind: str, builder: Any, *args: Any, **kwargs: Any) -> Tail:
        if len(self._shape) != 1:
            raise self._refusal(node, "is a softmax over something else than the outputs")
        return Tail(
            name=self._path(node),
            kind=kind,
            function=self._build(node, builder, *args, **kwargs),
            input_shape=self._shape,
        )

    def _reshape(self, node: fx.Node) -> Reshape:
        try:
            value = self._evaluate(node)
        except (RuntimeError, IndexError, TypeError) as error:
            raise self._refusal(node, f"fails on a batch of two examples ({error})") from error
        if value.ndim < 2 or value.shape[0] != 2:
            raise self._refusal(node, "mixes the examples of a batch. Keep the first dimension, as `x.flatten(1)` does")
        return Reshape(name=self._path(node), input_shape=self._shape, output_shape=tuple(value.shape[1:]))

    def _channel_scale(self, node: fx.Node, name: str, module: nn.modules.batchnorm._BatchNorm) -> ChannelScale:
        training = module.training and self.gradient.train_mode != "eval"
        if training or module.running_mean is None or module.running_var is None:
            raise self._refusal(node, links.why_refused(module))
        if self._shape[0] != module.num_features:
            raise InputError(
                f"Layer {name!r} ({_name(module)}) takes {module.num_features} channels, but `input_shape` "
                f"{self.input_shape} brings it {self._shape}. Check `input_shape`."
            )
        return ChannelScale(
            name=name,
            kind=_name(module),
            mean=self.names[id(module.running_mean)],
            variance=self.names[id(module.running_var)],
            weight=None if module.weight is None else self._parameter(name, "weight", module.weight),
            bias=None if module.bias is None else self._parameter(name, "bias", module.bias),
            eps=module.eps,
            input_shape=self._shape,
        )

    def _pool(self, node: fx.Node, function: Any) -> MeanPool | MaxPool | None:
        """A pooling, mean or maximum; `None` if its windows are single pixels. `function`: of a batch."""
        target = self._module(node) if node.op == "call_module" else node.target
        mean = isinstance(target, links.MEAN_MODULES) or target in links.MEAN_CALLS
        try:
            value = self._evaluate(node)
        except (RuntimeError, IndexError, TypeError) as error:
            raise self._refusal(node, f"fails on pictures of shape {self._shape} ({error})") from error
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) and value.ndim > 1 else ()
        if len(self._shape) != 3 or value.shape[:2] != (2, self._shape[0]):
            raise self._refusal(node, links.REFUSED_CALLS.get(target) or "pools something else than a picture")
        adaptive = isinstance(target, nn.AdaptiveAvgPool2d) or target is F.adaptive_avg_pool2d
        if shape == self._shape and adaptive:
            return None
        kind = _name(target) if isinstance(target, nn.Module) else _call_name(node)
        common = {"name": self._path(node), "kind": kind}
        if not mean:
            return MaxPool(**common, function=function, input_shape=self._shape, output_shape=shape)
        count = shape[1] * shape[2] if len(shape) == 3 else 1
        divides = adaptive and all(n % m == 0 for n, m in zip(self._shape[1:], shape[1:], strict=True))
        disjoint = count == 1 or divides
        if isinstance(target, nn.AvgPool2d):
            kernel, stride = _both(target.kernel_size), _both(target.stride)
            disjoint = all(k <= s for k, s in zip(kernel, stride, strict=True))
        return MeanPool(**common, function=function, input_shape=self._shape, output_shape=shape, disjoint=disjoint)

    def _call_alone(self, node: fx.Node) -> Any:
        """The call as a function of the chain's value, with everything else as it was given."""

        def function(x: Tensor) -> Any:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: x.clone() if n in self.places else self.values[n]
            )
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = node.target
            return target(*args, **kwargs)

        return function

    def _linear(self, name: str, module: nn.Linear) -> Affine:
        if self._shape != (module.in_features,):
            raise InputError(
                f"Layer {name!r} (Linear) takes a vector of {module.in_features} features per example, but "
                f"`input_shape` {self.input_shape} brings it {self._shape}. Check `input_shape`, or flatten "
                "before the layer."
            )
        weight, bias = self._parameters(name, module)
        return Affine(
            name=name,
            kind="Linear",
            weight=weight,
            bias=bias,
            input_shape=self._shape,
            output_shape=(module.out_features,),
        )

    def _conv(self, name: str, module: nn.Conv2d) -> Affine:
        shape = self._shape
        if len(shape) != 3 or shape[0] != module.in_channels:
            raise InputError(
                f"Layer {name!r} (Conv2d) takes pictures of {module.in_channels} channels, but `input_shape` "
                f"{self.input_shape} brings it {shape}. Check `input_shape`."
            )
        if module.padding_mode != "zeros":
            raise UnsupportedModelError(
                f"Module {name!r} (Conv2d) pads with {module.padding_mode!r}; the recursion knows zeros only. Use "
                '`padding_mode="zeros"`.'
            )
        weight, bias = self._parameters(name, module)
        before, after = _padding(module)
        stride, dilation, kernel = _pair(module.stride), _pair(module.dilation), _pair(module.kernel_size)
        size = [
            (shape[1 + i] + before[i] + after[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        ]
        if min(size) < 1:
            raise InputError(
                f"The kernel of layer {name!r} (Conv2d) is larger than its input {shape}. Check `input_shape`."
            )
        return Affine(
            name=name,
            kind="Conv2d",
            weight=weight,
            bias=bias,
            input_shape=shape,
            output_shape=(module.out_channels, *size),
            groups=module.groups,
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            padding=before,
            extra_padding=(after[0] - before[0], after[1] - before[1]),
        )

    def _parameters(self, name: str, module: nn.Linear | nn.Conv2d) -> tuple[str, str | None]:
        """The names of a layer's weight and bias among `named_parameters()`; each may serve one layer only."""
        weight = self._parameter(name, "weight", module.weight)
        return weight, None if module.bias is None else self._parameter(name, "bias", module.bias)

    def _parameter(self, layer: str, kind: str, parameter: Tensor) -> str:
        name = self.names.get(id(parameter))
        if name is None:
            raise UnsupportedModelError(
                f"The {kind} of layer {layer!r} is computed from other parameters (a parametrization?). Take "
                "`torch.nn.utils.parametrize.remove_parametrizations` to it."
            )
        if name in self.owners:
            raise UnsupportedModelError(
                f"Layer {layer!r} uses the parameter {name!r} a second time (first: {self.owners[name]!r}), so its "
                f"gradient is the sum of two and belongs to neither. {_WAY_OUT}"
            )
        self.owners[name] = layer
        return name

    # ------------------------------------------------------------------ helpers

    @property
    def _shape(self) -> Shape:
        """The shape of one example at the present end of the chain."""
        assert self.current is not None
        return tuple(self.values[self.current].shape[1:])

    @staticmethod
    def _meta(shape: Shape) -> Tensor:
        return torch.empty(2, *shape, device="meta", dtype=torch.float64)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _evaluate(self, node: fx.Node) -> Any:
        """What the call gives for the values at hand: sizes, arithmetic on them, reshapes of meta tensors."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = self._module(node) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    def _path(self, node: fx.Node) -> str:
        """The module's path in the model; for a call in a `forward`, the path of that module and the call's name."""
        if node.op == "call_module":
            return _name(unwrapped(self.model)) if self.single else str(node.target)
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return f"{stack[-1]}.{node.name}" if stack and stack[-1] else node.name

    def _refusal(self, node: fx.Node, why: str | None) -> UnsupportedModelError:
        if node.op == "call_module":
            subject = f"Module {self._path(node)!r} ({_name(self._module(node))})"
        else:
            subject = f"The call {self._path(node)!r} ({_call_name(node)}) in the model's `forward`"
        return UnsupportedModelError(f"{subject} {why or 'is no link of a chain of layers'}. {_WAY_OUT}")


class _Tracer(fx.Tracer):
    """Does not look into `opaque` modules."""

    def __init__(self, opaque: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return any(module is m for m in self.opaque) or super().is_leaf_module(module, path)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Through wrappers and compiled calls to the module that was written."""
        inner = unwrapped(m)
        compiled = getattr(inner, "_compiled_call_impl", None) is not None
        return super().call_module(inner, inner.forward if compiled or inner is not m else forward, args, kwargs)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of `torch.compile`, `nn.DataParallel` and their like: one child, under a name of theirs."""
    while True:
        children = dict(module.named_children())
        name = next((n for n in _WRAPPED if n in children), None)
        if name is None or not _wraps(module):
            return module
        module = children[name]


def _wraps(module: nn.Module) -> bool:
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return isinstance(module, kinds) or type(module).__name__ in ("OptimizedModule", "_FabricModule")


def _traced(root: nn.Module, model: nn.Module) -> fx.Graph:
    """The trace; modules without parameters that cannot be followed are calls, judged by what they do."""
    opaque = tuple(m for m in model.modules() if m is not model and not any(True for _ in m.parameters()))
    try:
        return _Tracer().trace(root)
    except Exception as error:  # a forward may raise anything on a symbolic input
        try:
            return _Tracer(opaque).trace(root)
        except Exception:
            raise UnsupportedModelError(
                f"The `forward` of {_name(model)} cannot be traced: it depends on the values of its input, or does "
                f"what torch.fx cannot follow ({type(error).__name__}: {error}). Write the model as nn.Sequential, or "
                "attack by gradient matching."
            ) from error


def _nodes(root: nn.Module, model: nn.Module) -> list[fx.Node]:
    """The nodes of the trace that the output depends on, in order."""
    graph = _traced(root, model)
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node in used:
            used |= {node, *node.all_input_nodes}
    return [n for n in graph.nodes if n in used]


def _attribute_of(node: fx.Node) -> Any:
    return node.args[1] if node.op == "call_function" and node.target is getattr else None


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in links.SHAPE_METHODS
    return node.target is getattr and node.args[1] in links.SHAPE_ATTRIBUTES


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _call_name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _pair(value: Sequence[int]) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)


def _both(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else _pair(value)


def _padding(module: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros before (top, left) and after (bottom, right); "same" puts the odd one after, as PyTorch does."""
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        before = _pair([t // 2 for t in total])
        return before, (total[0] - before[0], total[1] - before[1])
    both = (0, 0) if isinstance(module.padding, str) else _pair(module.padding)
    return both, both
