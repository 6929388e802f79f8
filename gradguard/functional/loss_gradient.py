"""A model and a loss as a pure function of parameters and inputs, and its gradient.

Letters, here and everywhere: `B` examples, `D` input elements per example, `P` parameters, `C` classes,
`R` independent problems solved at once, `K` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.checks import LossFunction, check_batch_shape, check_gradient, check_labels
from gradguard.functional.precision import full_precision
from gradguard.functional.vectors import Gradient

TrainMode = Literal["error", "eval"]


class LossGradient:
    """The gradient of a loss as a pure function of a model's parameters and inputs.

    `model`: any `nn.Module` that maps a batch `(B, *input_shape)` to outputs. Frozen parameters
        (`requires_grad=False`) and buffers are constants; tied parameters appear once, under the name that
        `named_parameters()` gives them. Nothing is stored on the model and nothing in it changes.
    `loss_fn`: `(outputs, targets) -> scalar`, for instance `nn.CrossEntropyLoss()`.
    `dtype`: compute in this dtype whatever the model's own (attacks run in float64, measurements of a
        half-precision model in float32). Default: the model's.
    `train_mode`: what to do with a module that is in training mode and there mixes examples (BatchNorm) or draws
        random numbers (Dropout): "error" refuses it by name, "eval" evaluates such modules, and only those, in
        eval mode while gradguard computes, and puts them back. The gradient is then that of the eval-mode model.
    `input_module`: for models of tokens, the name of the module that looks them up (`"transformer.wte"`), called once
        per forward pass. `inputs` are then that module's *outputs*, floating-point embeddings `(B, T, E)` of `T`
        tokens: the model is called with placeholder tokens, and what the module would have computed is replaced. Its
        own parameters get no gradient from the lookup, which is bypassed; where a head shares its table (tied weights),
        the head's share remains. `embed(tokens)` gives the embeddings of real tokens.

    Calling it gives the gradient as a dictionary keyed like `named_parameters()`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        dtype: torch.dtype | None = None,
        train_mode: TrainMode = "error",
        input_module: str | None = None,
    ) -> None:
        if train_mode not in ("error", "eval"):
            raise InputError(f'`train_mode` must be "error" or "eval", got {train_mode!r}.')
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"`dtype` must be a floating-point dtype, got {dtype}.")
        self.model = model
        self.loss_fn = loss_fn
        self.dtype = dtype
        self.train_mode: TrainMode = train_mode
        self.input_module = input_module
        if input_module is not None:
            _check_module_name(model, input_module)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(
                "The model has no trainable parameter, so there is no gradient to measure. "
                "Set `requires_grad_(True)` on the parameters whose gradient is sent."
            )

    def __repr__(self) -> str:
        at = "" if self.input_module is None else f", input_module={self.input_module!r}"
        return f"LossGradient({type(self.model).__name__}, {self.loss_fn}, dtype={self.dtype}{at})"

    # ------------------------------------------------------------------ the pure function

    def with_dtype(self, dtype: torch.dtype) -> LossGradient:
        """The same function computed in `dtype`."""
        return LossGradient(
            self.model, self.loss_fn, dtype=dtype, train_mode=self.train_mode, input_module=self.input_module
        )

    def parameters(self) -> Gradient:
        """The trainable parameters now, detached, in the computing dtype, keyed as `named_parameters()`."""
        return {n: self._cast(p.detach()) for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def num_parameters(self) -> int:
        """`P`, the number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def constants(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers, in the computing dtype."""
        frozen = {n: self._cast(p.detach()) for n, p in self.model.named_parameters() if not p.requires_grad}
        return frozen | {n: self._cast(b.detach()) for n, b in self.model.named_buffers()}

    @full_precision()
    def outputs(self, parameters: Gradient, inputs: Tensor) -> Tensor:
        """The model's outputs on a batch `(B, *input_shape)` as a function of `parameters`."""
        with self._evaluation(), self._lookup_replaced(inputs) as model_inputs:
            return functional_call(self.model, (parameters, self.constants()), (model_inputs,))

    @full_precision()
    def loss(self, parameters: Gradient, inputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar loss of a batch as a pure function: what every derivative here is taken of."""
        return self.loss_fn(self.outputs(parameters, inputs), targets)

    def cast(self, tensor: Tensor) -> Tensor:
        """`tensor` in the computing dtype if it is floating point, else unchanged."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(self.computing_dtype)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The outputs of `input_module` for `tokens`, integers `(B, T)`: `(B, T, E)` in the computing dtype, detached.

        Costs two forward passes: the second, from the embeddings and placeholder tokens, must give the same outputs.
        Raises `InputError` for what are no tokens, and `UnsupportedModelError` if the module is not called exactly
        once, if its outputs have another shape, or if the model looks at the tokens in another place, too.
        """
        if self.input_module is None:
            raise InputError('`embed` needs the name of the module that embeds: pass `input_module="..."`.')
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.numel() == 0:
            raise InputError(f"`tokens` must be integers (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}.")
        self.check_model()
        found: list[Any] = []
        parameters, module = self.parameters(), self.model.get_submodule(self.input_module)

        def recording(*arguments: Any, **options: Any) -> Any:
            found.append(original(*arguments, **options))
            return found[-1]

        original = module.forward
        with self._evaluation(), _forward_replaced(module, recording):
            expected = functional_call(self.model, (parameters, self.constants()), (tokens,))
        self._check_calls(len(found))
        embeddings = found[0]
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 3 or embeddings.shape[:2] != tokens.shape:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise UnsupportedModelError(
                f"Module {self.input_module!r} turns tokens of shape {tuple(tokens.shape)} into {got}; it must be "
                "(B, T, E), one embedding per token. Name the module that looks the tokens up."
            )
        again = self.outputs(parameters, embeddings)
        if not torch.allclose(again, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} looks at its tokens beside {self.input_module!r} (a mask of padding, a "
                "second table): from the embeddings and placeholder tokens it gives other outputs. Wrap it so that "
                "whatever else it derives from the tokens is fixed."
            )
        return embeddings.detach().clone()

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
    def __call__(self, inputs: Tensor, targets: Tensor) -> Gradient:
        """The gradient of the batch's loss.

        `inputs`: shape `(B, *input_shape)`; `targets`: shape `(B, ...)`, as the loss takes them.
        Returns one tensor per trainable parameter, in the parameter's shape.
        Raises `InputError` for an empty batch, labels out of range, a wrong device or a non-finite loss, and
        `UnsupportedModelError` for a train-mode BatchNorm or Dropout (see `train_mode`).
        """
        self.check_batch(inputs, targets)
        return grad(self.loss)(self.parameters(), self.cast(inputs), self.cast(targets))

    @full_precision()
    def per_example(self, inputs: Tensor, targets: Tensor, *, chunk_size: int | None = None) -> Gradient:
        """The gradient of each example's own loss: shape `(B, *parameter_shape)` per parameter.

        `chunk_size`: examples at a time; a bound on memory, which is `chunk_size * P` elements and more.
        """
        self.check_batch(inputs, targets)

        def one(parameters: Gradient, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(parameters, x[None], y[None])

        return vmap(grad(one), in_dims=(None, 0, 0), chunk_size=chunk_size)(
            self.parameters(), self.cast(inputs), self.cast(targets)
        )

    # ------------------------------------------------------------------ checks

    def check_model(self) -> None:
        """Raises `UnsupportedModelError` if a train-mode module mixes examples or is random, and that is refused."""
        offenders = self._train_mode_offenders()
        if offenders and self.train_mode == "error":
            name, module, why = offenders[0]
            more = f" (and {len(offenders) - 1} more)" if len(offenders) > 1 else ""
            raise UnsupportedModelError(
                f"Module {name!r} ({type(module).__name__}) is in training mode{more}: there it {why}. "
                'Call `model.eval()` first, or pass `train_mode="eval"` to measure the eval-mode gradient, '
                "or replace it with a layer that works per example (GroupNorm, LayerNorm)."
            )

    def check_batch(self, inputs: Tensor, targets: Tensor) -> None:
        """Raises a clear error for a batch that no gradient can be taken of. Costs one forward pass."""
        self.check_model()
        if self.input_module is not None:
            self._check_embeddings(inputs)
        check_batch_shape(inputs, targets)
        parameter = self._example_parameter()
        for name, tensor in (("inputs", inputs), ("targets", targets)):
            if tensor.device != parameter.device:
                raise InputError(
                    f"`{name}` are on {tensor.device}, the model is on {parameter.device}. "
                    f"Move one to the other: `{name}.to({str(parameter.device)!r})`."
                )
        if not torch.isfinite(inputs).all():
            raise InputError("`inputs` hold NaN or infinite values. Clean the data before measuring it.")
        with torch.no_grad():
            parameters, targets = self.parameters(), self.cast(targets)
            try:
                outputs = self.outputs(parameters, self.cast(inputs))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise InputError(
                    f"Inputs of shape {tuple(inputs.shape)} do not go through {type(self.model).__name__}: {error}"
                ) from error
            check_labels(outputs, targets, self.loss_fn)
            loss = self.loss_fn(outputs, targets)
        if loss.ndim:
            raise InputError(
                f"The loss has shape {tuple(loss.shape)}; it must be one number per batch. "
                'Use `reduction="mean"` or "sum".'
            )
        if not torch.isfinite(loss):
            raise InputError(
                f"The loss is {loss.item()}, so its gradient says nothing. Look for diverged parameters, "
                "unscaled inputs or a log of zero in the loss."
            )

    def check_gradient(self, gradient: Mapping[str, Tensor]) -> None:
        """Raises `InputError` unless `gradient` has this model's names and shapes and only finite values."""
        check_gradient(gradient, self.parameters())

    # ------------------------------------------------------------------ inside

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _example_parameter(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.requires_grad)

    def _check_embeddings(self, inputs: Tensor) -> None:
        """Raises `InputError` for tokens, and for what no lookup could have given."""
        if not isinstance(inputs, Tensor):
            return  # refused with all other inputs
        where = f"the embeddings that {self.input_module!r} gives, floating point (B, T, E)"
        if not inputs.is_floating_point():
            raise InputError(f"`inputs` must be {where}, got {inputs.dtype}. For tokens pass `gradient.embed(tokens)`.")
        if inputs.ndim != 3:
            raise InputError(f"`inputs` must be {where}, got shape {tuple(inputs.shape)}.")
        module = self.model.get_submodule(self.input_module or "")
        if isinstance(module, nn.Embedding) and inputs.shape[2] != module.embedding_dim:
            raise InputError(f"`inputs` must be {where} with E = {module.embedding_dim}, got E = {inputs.shape[2]}.")

    def _check_calls(self, calls: int) -> None:
        """Raises `UnsupportedModelError` unless the input module was called once."""
        if calls != 1:
            times = "never" if calls == 0 else f"{calls} times"
            raise UnsupportedModelError(
                f"Module {self.input_module!r} is called {times} in a forward pass of {type(self.model).__name__}; "
                "`input_module` must be the one that embeds the tokens, called as a module and once."
            )

    @contextmanager
    def _lookup_replaced(self, inputs: Tensor) -> Iterator[Tensor]:
        """What to call the model with: `inputs`, or placeholder tokens while the input module answers with `inputs`."""
        if self.input_module is None:
            yield inputs
            return
        calls = 0

        def given(*arguments: Any, **options: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return inputs

        with _forward_replaced(self.model.get_submodule(self.input_module), given):
            yield torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
        self._check_calls(calls)

    def _train_mode_offenders(self) -> list[tuple[str, nn.Module, str]]:
        found = []
        for name, module in self.model.named_modules():
            why = _train_mode_effect(module)
            if why:
                found.append((name or type(module).__name__, module, why))
        return found

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Switch exactly the modules that misbehave in training mode to eval, and back."""
        modules = [m for _, m, _ in self._train_mode_offenders()] if self.train_mode == "eval" else []
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module in modules:
                module.training = True


def _check_module_name(model: nn.Module, name: str) -> None:
    """Raises `InputError`, with the names that come close, if `model` has no sub-module `name`."""
    names = [n for n, _ in model.named_modules() if n]
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        near += [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n not in near]
        raise InputError(f"{type(model).__name__} has no module {name!r}; there are {near}, for instance.")


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` for a while; hooks on it still run, and what stood in the way before comes back.

    On the instance, as `layer_by_layer` does it: within the linearisation's own replacement this one is the
    inner one, so a lookup that is bypassed is never recorded.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _train_mode_effect(module: nn.Module) -> str | None:
    """What `module` does in training mode that a gradient per example cannot be taken through, or None."""
    if not module.training:
        return None
    if isinstance(module, _BatchNorm):
        return "normalises by the batch's statistics, so every example's gradient depends on all the others"
    if isinstance(module, _DropoutNd) and module.p > 0:
        return "drops values at random, so the gradient is not a function of the inputs"
    random = isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
    inner_dropout = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and float(module.dropout) > 0
    if random or inner_dropout:
        return "draws random numbers, so the gradient is not a function of the inputs"
    return None
