"""Models that are no function of parameters and inputs while they train: what mixes examples, and what is random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradguard.errors import UnsupportedModelError
from gradguard.functional.preserved import ModuleState, RandomState
from gradguard.functional.structures import output_tensors

#: A module's path, the module, and what it does.
Offender = tuple[str, nn.Module, str]
#: How often a model that drew random numbers is asked again, to see whether they matter.
TRIES = 4


def offenders(model: nn.Module) -> list[Offender]:
    """Modules that in their present mode mix examples or draw random numbers, as far as their class says so."""
    found = []
    for name, module in model.named_modules():
        why = _effect(module)
        if why:
            found.append((name or type(module).__name__, module, why))
    return found


def refuse(model: nn.Module, found: Sequence[Offender]) -> None:
    """Raises `UnsupportedModelError` that names the first of them, if there is one."""
    if not found:
        return
    name, module, why = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise UnsupportedModelError(
        f"Module {name!r} ({type(module).__name__}) is in training mode{more}: there it {why}. "
        'Call `model.eval()` first, or pass `train_mode="eval"` to measure the eval-mode gradient, '
        'or `train_mode="as sent"` to measure what the training step sends, '
        "or replace it with a layer that works per example (GroupNorm, LayerNorm)."
    )


def check_parameters_and_hooks(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` for complex parameters, and for hooks that run at backward."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"Module {name or type(module).__name__!r} is compiled to TorchScript (`torch.jit`), which takes no "
                "parameters from outside. Pass the Python module that it was made from; its weights are the same."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"Parameter {name!r} is complex ({parameter.dtype}); gradients here are real. Keep its real and "
                "imaginary parts as two parameters."
            )
        if parameter._backward_hooks:
            raise UnsupportedModelError(
                f"Parameter {name!r} has a backward hook, which may change the gradient that is sent; gradguard "
                "computes on copies, where it does not run. Remove the hook while measuring, or apply what it does to "
                "the message."
            )
    wrapped = {id(m) for w in model.modules() if hasattr(w, "autograd_grad_sample_hooks") for m in w.modules()}
    for name, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if hooks and id(module) not in wrapped:
            raise UnsupportedModelError(
                f"Module {name or type(module).__name__!r} has a backward hook, which may change the gradient and "
                "cannot be differentiated again. Remove the hook while measuring."
            )


def check_deterministic(model: nn.Module, evaluate: Callable[[], Any]) -> Any:
    """Outputs, if they are the same each time.

    Found by effect: whether the model draws from a random number generator (torch's, NumPy's, Python's or its own), and
    then whether the outputs change. `evaluate` itself puts the generators back, so they are watched inside the model.

    Args:
        model: Watched while it is evaluated.
        evaluate: Gives the outputs.

    Returns:
        The outputs.

    Raises:
        UnsupportedModelError: The model draws random numbers that matter, or from a generator of its own.
    """
    with _Draws(model) as draws:
        outputs = evaluate()
    if not draws.where:
        return outputs
    before = RandomState.now()
    try:
        for attempt in range(TRIES):
            _seed_all(attempt + 1)
            again = evaluate()
            pairs = zip(output_tensors(outputs), output_tensors(again), strict=False)
            if draws.own or any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
                raise UnsupportedModelError(
                    f"Module {draws.where!r} of {type(model).__name__} draws random "
                    "numbers, so its gradient is not a function of the inputs. Call `model.eval()` first, or pass "
                    '`train_mode="as sent"` with the random state of the step that is sent '
                    "(`gradguard.random_state()`)."
                )
    finally:
        before.restore()
    return outputs


def _seed_all(seed: int) -> None:
    """All global generators somewhere else; the caller puts them back."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the user's model draws from it
    random.seed(seed)


class _Draws:
    """While it lasts: which module of a model first draws random numbers, and whether from a generator of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.where, self.own = model, "", False
        self._handles: list[Any] = []

    def __enter__(self) -> _Draws:
        before: list[tuple[RandomState, ModuleState | None]] = []

        def enter(module: nn.Module, *_: Any) -> None:
            before.append((RandomState.now(), ModuleState(module) if module is self.model else None))

        def leave(name: str) -> Callable[..., None]:
            def look(module: nn.Module, *_: Any) -> None:
                state, attributes = before.pop()
                own = attributes is not None and attributes.random_moved()
                if not self.where and (own or not state.same_as(RandomState.now())):
                    self.where, self.own = name or type(module).__name__, own

            return look

        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave(name), always_call=False))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _effect(module: nn.Module) -> str | None:
    """What `module` does in training mode that a gradient per example cannot be taken through, or None."""
    if not module.training:
        return None
    if isinstance(module, _BatchNorm):
        return "normalises by the batch's statistics, so every example's gradient depends on all the others"
    if isinstance(module, _DropoutNd) and module.p > 0:
        return "drops values at random, so the gradient is not a function of the inputs"
    is_random = isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
    inner_dropout = isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and float(module.dropout) > 0
    if is_random or inner_dropout:
        return "draws random numbers, so the gradient is not a function of the inputs"
    return None
