"""A model and a loss as a pure function of parameters and inputs, and its gradient.

Letters, here and everywhere: `B` examples, `D` input elements per example, `P` parameters, `C` classes,
`R` independent problems solved at once, `K` columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.checks import (
    LossFunction,
    as_loss_takes_them,
    check_batch_shape,
    check_devices,
    check_gradient,
    check_labels,
    check_loss,
)
from gradguard.functional.precision import full_precision
from gradguard.functional.preserved import (
    RandomState,
    cast_state,
    loss_module,
    preserved,
    random_state_kept,
    without_checkpointing,
)
from gradguard.functional.structures import (
    TARGETS,
    Rest,
    Template,
    is_structured,
    map_rest,
    rebuild,
    rows_of,
    split,
)
from gradguard.functional.token_lookup import TokenLookup, check_module_name
from gradguard.functional.train_mode import check_deterministic, check_parameters_and_hooks, offenders, refuse
from gradguard.functional.vectors import Gradient

TrainMode = Literal["error", "eval", "as sent"]


class LossGradient:
    """The gradient of a loss as a pure function of a model's parameters and inputs.

    Nothing is stored on the model and nothing of the user's changes: it is evaluated on copies of the batch and of the
    buffers, and what a forward pass does to the model's attributes and to the global random numbers is undone.

    Args:
        model: Any `nn.Module`. Called as `model(inputs)`, `model(*inputs)` for a tuple, `model(**inputs)` for a
            mapping. Frozen parameters (`requires_grad=False`) and buffers are constants. Tied parameters appear once,
            under the name that `named_parameters()` gives them; so does a module that has two names. A compiled model
            is evaluated uncompiled.
        loss_fn: `(outputs, targets) -> scalar`, for instance `nn.CrossEntropyLoss()`. `outputs` are what the model
            returns, a tuple or a `ModelOutput` too.
        dtype: Compute in this dtype whatever the model's own (attacks run in float64, measurements of a
            half-precision model in float32). Default: the model's.
        train_mode: What to do with a module that is in training mode and there mixes examples (BatchNorm) or draws
            random numbers (Dropout). "error" refuses it by name. "eval" evaluates such modules, and only those, in eval
            mode while gradguard computes; the gradient is then that of the eval-mode model. "as sent" computes what
            the training step computes: BatchNorm with the batch's statistics (every example's gradient then depends on
            the others), dropout with the masks that `random_state` gives.
        random_state: For `train_mode="as sent"`: the random numbers' state before the step's forward pass, from
            `random_state()`. Default: the state when this object is made.
        input_module: For models of tokens, the name of the module that looks them up (`"transformer.wte"`), called once
            per forward pass. The private inputs are then that module's *outputs*, floating-point embeddings
            `(B, T, E)` of `T` tokens: the model is called with placeholder tokens, and what the module would have
            computed is replaced. Its own parameters get no gradient from the lookup, which is bypassed; where a head
            shares its table (tied weights), the head's share remains. `embed(tokens)` gives the embeddings.
        private: Which leaf of the inputs is private where they are a tuple or a mapping: its key or position. Default:
            the first floating-point tensor; the others are taken as known to the attacker.

    Calling it gives the gradient as a dictionary keyed like `named_parameters()`.

    Raises:
        InputError: The model has no trainable parameter, or an argument is none of its values.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        dtype: torch.dtype | None = None,
        train_mode: TrainMode = "error",
        random_state: RandomState | None = None,
        input_module: str | None = None,
        private: str | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` must be an nn.Module, got {type(model).__name__}.")
        if not callable(loss_fn):
            raise InputError(f"`loss_fn` must be a function (outputs, targets) -> scalar, got {loss_fn!r}.")
        if train_mode not in ("error", "eval", "as sent"):
            raise InputError(f'`train_mode` must be "error", "eval" or "as sent", got {train_mode!r}.')
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"`dtype` must be a floating-point dtype, got {dtype}.")
        self.model, self.loss_fn, self.dtype = model, loss_fn, dtype
        self.train_mode: TrainMode = train_mode
        self.random_state = random_state or (RandomState.now() if train_mode == "as sent" else None)
        self.input_module, self.private = input_module, private
        self._lookup = None if input_module is None else TokenLookup(model, input_module)
        self._template: Template | None = None
        self._company: tuple[Tensor, Rest, Tensor] | None = None
        if input_module is not None:
            check_module_name(model, input_module)
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            raise InputError(
                f"{type(model).__name__} has lazy parameters without a shape. Run one batch through it first."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(
                "The model has no trainable parameter, so there is no gradient to measure. "
                "Set `requires_grad_(True)` on the parameters whose gradient is sent."
            )

    def __repr__(self) -> str:
        at = "" if self.input_module is None else f", input_module={self.input_module!r}"
        return f"LossGradient({type(self.model).__name__}, {self.loss_fn}, dtype={self.dtype}{at})"

    def with_dtype(self, dtype: torch.dtype) -> LossGradient:
        """The same function computed in `dtype`."""
        other = copy(self)
        other.dtype = dtype
        return other

    def with_loss(self, loss_fn: LossFunction) -> LossGradient:
        """The same model under another loss."""
        other = copy(self)
        other.loss_fn = loss_fn
        return other

    def in_company(self, inputs: Tensor, rest: Rest, rows: Tensor) -> LossGradient:
        """As a function of some examples of a batch, the others as they are.

        Args:
            inputs: The batch, `(B, *input_shape)`.
            rest: Its rest.
            rows: The examples' places in it, `(n,)`.

        Returns:
            A loss gradient of `n` examples: of the whole batch's loss.
        """
        other = copy(self)
        other._company = inputs.detach(), rest, rows
        return other

    @property
    def has_company(self) -> bool:
        """Whether other examples are part of the function: see `in_company`."""
        return self._company is not None

    # ------------------------------------------------------------------ structures

    @full_precision()
    def bind(self, inputs: Any, targets: Any) -> tuple[LossGradient, Tensor, Rest]:
        """A batch as the private tensor and the rest, and the function that takes it so.

        Args:
            inputs: A tensor `(B, *input_shape)`, or a tuple or mapping of tensors with the batch first.
            targets: A tensor `(B, ...)`, or a structure of them.

        Returns:
            The function (itself where both are tensors), the private leaf, and the rest: the targets, or a dictionary.

        Raises:
            InputError: There is no private leaf.
        """
        if self._template is not None or not (is_structured(inputs) or is_structured(targets)):
            return self, plain(inputs), plain(targets)
        other = copy(self)
        other._template, private, rest = split(inputs, targets, self.private)
        return other, plain(private), map_rest(plain, rest)

    @property
    def is_bound(self) -> bool:
        """Whether its batches are pairs of a private tensor and a dictionary: see `bind`."""
        return self._template is not None

    @property
    def known_inputs(self) -> tuple[str, ...]:
        """The floating-point inputs that a bound function takes as known to the attacker."""
        return () if self._template is None else self._template.known

    def _filled(self, inputs: Tensor, rest: Rest) -> tuple[Any, Any]:
        return (inputs, rest) if self._template is None else self._template.fill(inputs, rest)

    # ------------------------------------------------------------------ the pure function

    @full_precision()
    def parameters(self) -> Gradient:
        """The trainable parameters now, detached, in the computing dtype, keyed as `named_parameters()`."""
        return {n: self._cast(_plain(p)) for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_parameters(self) -> int:
        """`P`, the number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def constants(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers, in the computing dtype: the very tensors, not to be written to."""
        frozen = {n: self._cast(_plain(p)) for n, p in self.model.named_parameters() if not p.requires_grad}
        return frozen | {n: self._cast(_plain(b)) for n, b in self.model.named_buffers()}

    @full_precision()
    def outputs(self, parameters: Gradient, inputs: Any, rest: Rest = None) -> Any:
        """The model's outputs on a batch as a function of `parameters`.

        Args:
            parameters: One tensor per trainable parameter.
            inputs: `(B, *input_shape)`.
            rest: Of a bound function, see `bind`.

        Returns:
            What the model returns: a tensor, a tuple or a mapping.
        """
        if self._company is not None:
            whole, rest, rows = self._company
            inputs, rest = whole.to(inputs).index_copy(0, rows, inputs), self.cast(rest)
        private = inputs.clone() if isinstance(inputs, Tensor) else inputs  # a model may work in place
        with ExitStack() as stack:
            if self._lookup is not None:
                private = stack.enter_context(self._lookup.replaced(private))
            structure, _ = self._filled(private, rest)
            return self.outputs_of(parameters, structure)

    def outputs_of(self, parameters: Gradient, structure: Any) -> Any:
        """The outputs on whole inputs, as the user would hand them to the model: nothing is replaced in them."""
        own = rebuild(structure, _own) if is_structured(structure) else structure
        with self._evaluation():
            return self._call(parameters, own)

    def without_lookup(self) -> LossGradient:
        """The same function of the tokens themselves."""
        other = copy(self)
        other._lookup, other._template = None, None
        return other

    def _call(self, parameters: Gradient, inputs: Any) -> Any:
        positional: tuple[Any, ...] = (inputs,)
        named: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            positional, named = (), dict(inputs)
        elif isinstance(inputs, tuple | list):
            positional = tuple(inputs)
        model = _unwrapped(self.model)
        return functional_call(model, self._by_slot(model, parameters), positional, named, tie_weights=False)

    def _by_slot(self, model: nn.Module, parameters: Gradient) -> dict[str, Tensor]:
        """Every place of the model that holds a parameter or buffer, and the tensor to put there for a while.

        By place and not by name: a module with two names is one place (PyTorch's `functional_call` would fill it twice,
        and leave the second filling in the model: its issue 164759), tied parameters are two.

        Returns:
            Tensors by the place's name.
        """
        own: dict[int, str] = {id(p): n for n, p in self.model.named_parameters()}
        copies: dict[int, Tensor] = {}
        slots = {}
        for path, module in model.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                known = own[id(parameter)]
                slots[prefix + name] = parameters[known] if known in parameters else self._cast(_plain(parameter))
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in copies:
                    # A copy: statistics and counters move in it, the model's own stay.
                    copies[id(buffer)] = self._cast(_plain(buffer)).clone()
                slots[prefix + name] = copies[id(buffer)]
        return slots

    @full_precision()
    def loss(self, parameters: Gradient, inputs: Any, targets: Any) -> Tensor:
        """The scalar loss of a batch as a pure function: what every derivative here is taken of."""
        return self.loss_of(self.outputs(parameters, inputs, targets), targets)

    @full_precision()
    def loss_of(self, outputs: Any, rest: Rest) -> Tensor:
        """The scalar loss of a batch's outputs."""
        if self._company is not None:
            rest = self.cast(self._company[1])
        targets = rest if self._template is None else self._template.fill_targets(rest)
        with cast_state(loss_module(self.loss_fn), self.dtype):
            return self.loss_fn(outputs, as_loss_takes_them(targets, outputs))

    def cast(self, tensor: Any) -> Any:
        """A tensor, or every tensor of a rest, as gradguard computes with it.

        Args:
            tensor: A tensor, a dictionary of tensors, or anything else, which stays as it is.

        Returns:
            The same in the computing dtype where it is floating point; else in its own dtype.
        """
        if isinstance(tensor, dict):
            return map_rest(self.cast, tensor)
        if not isinstance(tensor, Tensor):
            return tensor
        tensor = plain(tensor)
        return tensor.to(self.computing_dtype) if tensor.is_floating_point() else tensor

    @full_precision()
    def embed(self, tokens: Any) -> Any:
        """The outputs of `input_module` for `tokens`: `(B, T, E)` in the computing dtype, detached.

        Costs two forward passes: the second, from the embeddings and placeholder tokens, must give the same outputs.

        Args:
            tokens: Integers `(B, T)`, or the model's whole inputs (a tuple or a mapping) with the tokens in them.

        Returns:
            The embeddings `(B, T, E)`; for a structure, the structure with the embeddings in the tokens' place.

        Raises:
            InputError: They are no tokens.
            UnsupportedModelError: The module is not called exactly once, its outputs have another shape, or the model
                looks at the tokens in another place, too.
        """
        if self._lookup is None:
            raise InputError('`embed` needs the name of the module that embeds: pass `input_module="..."`.')
        self.check_model()
        return self._lookup.embed(self, tokens)

    @property
    def computing_dtype(self) -> torch.dtype:
        """The dtype in which gradients are computed."""
        return self.dtype or self._example_parameter().dtype

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return self._example_parameter().device

    # ------------------------------------------------------------------ gradients

    @full_precision()
    def __call__(self, inputs: Any, targets: Any) -> Gradient:
        """The gradient of the batch's loss.

        Args:
            inputs: `(B, *input_shape)`, or a structure, see `bind`.
            targets: `(B, ...)`, as the loss takes them.

        Returns:
            One tensor per trainable parameter, in the parameter's shape.

        Raises:
            InputError: For an empty batch, labels out of range, a wrong device or a non-finite loss.
            UnsupportedModelError: For a train-mode BatchNorm or Dropout (see `train_mode`), and for what is random.
        """
        function, inputs, targets = self.bind(inputs, targets)
        function.check_batch(inputs, targets)
        return function.gradient_at(function.parameters(), function.cast(inputs.detach()), function.cast(targets))

    @full_precision()
    def gradient_at(self, parameters: Gradient, inputs: Tensor, rest: Rest, *, create_graph: bool = False) -> Gradient:
        """The gradient of a batch that is checked already.

        Args:
            parameters: One tensor per trainable parameter.
            inputs: `(B, *input_shape)`, the private tensor.
            rest: Targets, or targets and known inputs by name.
            create_graph: Whether the gradient can be differentiated.

        Returns:
            One tensor per trainable parameter.

        Raises:
            UnsupportedModelError: The loss does not depend on the parameters in a way that autograd sees, or the model
                uses a parameter past the module that holds it.
        """
        leaves = {n: p if p.requires_grad else p.detach().requires_grad_(True) for n, p in parameters.items()}
        with differentiable(create_graph):
            loss = self.loss(leaves, inputs, rest)
            self._check_graph(loss)
            found = torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    @full_precision()
    def per_example(self, inputs: Any, targets: Any, *, chunk_size: int | None = None) -> Gradient:
        """The gradient of each example's own loss, a batch of one.

        Args:
            inputs: `(B, *input_shape)`, or a structure.
            targets: `(B, ...)`.
            chunk_size: Examples at a time; a bound on memory, which is `chunk_size * P` elements and more.

        Returns:
            `(B, *parameter_shape)` per trainable parameter.

        Raises:
            InputError: What `check_batch` raises.
            OutOfMemoryError: More examples at a time than memory holds: give a smaller `chunk_size`.
        """
        function, inputs, targets = self.bind(inputs, targets)
        function.check_batch(inputs, targets)
        parameters, x, rest = function.parameters(), function.cast(inputs.detach()), function.cast(targets)

        def own(p: Gradient, one: Tensor, known: Rest) -> Tensor:
            return function.loss(p, one[None], map_rest(lambda part: part[None], known))

        try:
            return vmap(grad(own), in_dims=(None, 0, 0), chunk_size=chunk_size)(parameters, x, rest)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            # What cannot be mapped over, as a forward pass that looks at its data: one by one.
            rows = (slice(r, r + 1) for r in range(len(x)))
            each = [function.gradient_at(parameters, x[r], rows_of(rest, r)) for r in rows]
            return {n: torch.stack([g[n] for g in each]) for n in parameters}

    # ------------------------------------------------------------------ checks

    def check_model(self) -> None:
        """Raises `UnsupportedModelError` for what is known to be no function of parameters and inputs.

        A train-mode module that mixes examples or is random, where that is refused; a backward hook, which may change
        the gradient; a complex parameter.
        """
        check_parameters_and_hooks(self.model)
        if self.train_mode == "error":
            refuse(self.model, offenders(self.model))

    @full_precision()
    def check_batch(self, inputs: Any, targets: Any) -> Any:
        """Check a batch that a gradient is to be taken of. Costs one forward pass, a few more if the model draws random
        numbers.

        Args:
            inputs: `(B, *input_shape)`, or a structure.
            targets: `(B, ...)`.

        Returns:
            The model's outputs on the batch, without a graph.

        Raises:
            InputError: Inputs and targets do not go together or not through the model, a value is not finite, a label
                is out of range, or the loss is not one finite number.
            UnsupportedModelError: What `check_model` raises, and for a model whose outputs are random.
        """
        self.check_model()
        function, inputs, targets = self.bind(inputs, targets)
        if function._lookup is not None:
            function._lookup.check_embeddings(inputs)
        check_batch_shape(inputs, targets, structured=function._template is not None)
        check_devices(inputs, targets, self.device)
        if not torch.isfinite(inputs).all():
            raise InputError("`inputs` hold NaN or infinite values. Clean the data before measuring it.")
        with torch.no_grad():
            outputs = function.checked_outputs(function.cast(inputs.detach()), function.cast(targets))
            check_labels(outputs, targets if isinstance(targets, Tensor) else targets.get(TARGETS), self.loss_fn)
            check_loss(lambda: function.loss_of(outputs, function.cast(targets)), self.loss_fn)
        return outputs

    def checked_outputs(self, inputs: Tensor, rest: Rest) -> Any:
        """The outputs, errors of the model's own told as errors of the input. Raises for a model that is random."""
        try:
            if self.train_mode == "as sent":
                return self.outputs(self.parameters(), inputs, rest)
            return check_deterministic(self.model, lambda: self.outputs(self.parameters(), inputs, rest))
        except (torch.OutOfMemoryError, InputError):
            raise
        except Exception as error:  # whatever the user's model raises
            raise InputError(
                f"Inputs of shape {tuple(inputs.shape)} do not go through {type(self.model).__name__}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def check_gradient(self, gradient: Mapping[str, Tensor]) -> None:
        """Raises `InputError` unless `gradient` has this model's names and shapes and only finite values."""
        check_gradient(gradient, self.parameters())

    def _check_graph(self, loss: Tensor) -> None:
        """Refuse a loss that was computed with the model's own parameter objects.

        A model that keeps them in a plain list, or in a closure, uses them past `functional_call`: the gradient by them
        would be lost.

        Raises:
            UnsupportedModelError: It was, or it depends on no parameter at all.
        """
        if not loss.requires_grad:
            raise UnsupportedModelError(
                f"The loss does not depend on any trainable parameter of {type(self.model).__name__} in a way that "
                "autograd sees: look for a `detach`, a `no_grad` or a conversion to NumPy in its forward."
            )
        own = {id(p): n for n, p in self.model.named_parameters()}
        for node in graph_nodes((loss,)):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in own:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} uses its parameter {own[id(variable)]!r} past the module that holds "
                    "it (from a plain list or a closure), so its gradient cannot be taken as a function. Use it as "
                    "`module.weight`, or keep it in an `nn.ParameterList`."
                )

    # ------------------------------------------------------------------ inside

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _example_parameter(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.requires_grad)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """As gradguard evaluates a model: uncompiled, its attributes kept, the random numbers' state kept."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(random_state_kept())
            stack.enter_context(preserved(self.model))
            stack.enter_context(without_checkpointing())
            if self.random_state is not None:
                self.random_state.restore()
            if self.train_mode == "eval":
                for _, module, _ in offenders(self.model):
                    module.training = False
            _drop_grad_sample_hooks(self.model)
            yield


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs behind some tensors, once."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(parent for parent, _ in node.next_functions)


def random_state() -> RandomState:
    """The global random numbers' state now: take it before a step's forward pass, for `train_mode="as sent"`."""
    return RandomState.now()


@contextmanager
def differentiable(twice: bool = True) -> Iterator[None]:
    """With gradients, and `twice`: with kernels that can be differentiated twice (attention by its formula)."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module behind a wrapper that copies a model to several devices, which a pure function must not."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _drop_grad_sample_hooks(model: nn.Module) -> None:
    """Without the hooks of Opacus's `GradSampleModule`, which keep every activation; the caller puts them back."""
    for wrapper in model.modules():
        if not hasattr(wrapper, "autograd_grad_sample_hooks"):
            continue
        for module in wrapper.modules():
            for hooks in (module._forward_hooks, module._backward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(getattr(hook, "func", hook), "__self__", None) is wrapper:
                        del hooks[key]


def _plain(tensor: Tensor) -> Tensor:
    """Detached, and no inference tensor."""
    detached = tensor.detach()
    return detached.clone() if detached.is_inference() else detached


def plain(value: Any) -> Any:
    """A tensor made in inference mode as one that autograd takes; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


__all__ = ["LossGradient", "TrainMode", "random_state"]
