"""From a call in a traced model to the step of a chain that it is, or to why it is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from gradguard.chain import links
from gradguard.chain.activation import Shape
from gradguard.chain.rewiring import Rewire, rewired
from gradguard.chain.sequence import all_parameters
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
from gradguard.chain.tracing import WAY_OUT, call_name, name_of, unwrapped
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient


class StepBuilder:
    """From one call of a traced model to its step. Values are tensors on the meta device, with a batch of two, or plain
    numbers."""

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
            return self._tail(node, call_name(node), links.TAIL_CALLS[target], *node.args[1:], **node.kwargs)
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

        Returns:
            The step.
        """
        trained = bool(self.trained & set(node.all_input_nodes))
        if isinstance(function, nn.Module):
            trained = any(True for _ in function.parameters())
            function = self._pure(function)
        elif why is not None and node.target not in links.ADD_CALLS:
            raise self._refusal(node, why)
        if trained:
            raise self._refusal(
                node, why or "computes with a trained parameter outside of a layer. Use nn.BatchNorm2d for that"
            )
        kind = name_of(self._module(node)) if node.op == "call_module" else call_name(node)
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
                f"Layer {name!r} ({name_of(module)}) takes {module.num_features} channels, but `input_shape` "
                f"{self.input_shape} brings it {self._shape}. Check `input_shape`."
            )
        return ChannelScale(
            name=name,
            kind=name_of(module),
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
        kind = name_of(target) if isinstance(target, nn.Module) else call_name(node)
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
            first = "it is called twice" if self.owners[name] == layer else f"first: {self.owners[name]!r}"
            raise UnsupportedModelError(
                f"Layer {layer!r} uses the parameter {name!r} a second time ({first}), so its "
                f"gradient is the sum of two and belongs to neither. {WAY_OUT}"
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
            return name_of(unwrapped(self.model)) if self.single else str(node.target)
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        return f"{stack[-1]}.{node.name}" if stack and stack[-1] else node.name

    def _refusal(self, node: fx.Node, why: str | None) -> UnsupportedModelError:
        if node.op == "call_module":
            subject = f"Module {self._path(node)!r} ({name_of(self._module(node))})"
        else:
            subject = f"The call {self._path(node)!r} ({call_name(node)}) in the model's `forward`"
        return UnsupportedModelError(f"{subject} {why or 'is no link of a chain of layers'}. {WAY_OUT}")


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
