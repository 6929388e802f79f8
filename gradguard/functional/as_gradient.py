"""Whatever holds a gradient, as the dictionary that everything else here works on.

Clients keep their messages in many forms: a list in parameter order, numpy arrays, the difference of two state
dictionaries with the prefixes of a wrapper, sparse tensors. They are sorted to the model's parameters by name or by
order, checked, and nothing is guessed: what does not fit is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gradguard.errors import InputError
from gradguard.functional.vectors import Gradient, unflatten

Missing = Literal["error", "unsent"]

#: What wrappers call the module inside: DataParallel, `torch.compile`, Opacus, Lightning Fabric, FSDP, checkpointing.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)


@dataclass(frozen=True, kw_only=True)
class SortedMessage:
    """A message sorted to a model's tensors.

    Args:
        gradient: One tensor per trainable parameter that was sent, in the parameter's shape, on its device and in at
            least its precision, in the order of `named_parameters()`.
        unsent: Trainable parameters that the message does not hold.
        buffers: Names of buffers that it holds anything but zeros of. They are no part of a gradient.
    """

    gradient: Gradient
    unsent: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()


def as_gradient(model: nn.Module, anything: Any, *, before: Any = None, missing: Missing = "error") -> Gradient:
    """The gradient in `anything`, keyed as `named_parameters()`.

    Args:
        model: the model whose trainable parameters the gradient is of.
        anything: one of
            - a dictionary keyed as `named_parameters()` or `state_dict()`. Names of wrappers (`module.`,
              `_orig_mod.`, `_module.`, `_forward_module.`) are ignored on either side, at any depth; a tied parameter
              may come under any of its names; buffers are dropped;
            - a list, tuple or iterator of tensors in the order of the trainable parameters, of all parameters, or of
              `state_dict()`; or of pairs (name, tensor);
            - one vector of all trainable parameters' elements, as `parameters_to_vector` gives it;
            - a module: the `.grad` of its parameters.
            Values may be dense or sparse tensors of any real dtype on any device, numpy arrays or numbers. `None` is a
            parameter that got no gradient, as in `p.grad is None`: zeros.
        before: the weights before local training, in any of these forms; `anything` then holds the weights after it,
            and the result is `before - after`, which points where a gradient points.
        missing: what to do if a dictionary lacks a trainable parameter: "error" refuses it, "unsent" leaves it out.

    Returns:
        One tensor per trainable parameter, in its shape, on its device and in at least its dtype. Tensors are
        detached; they may share memory with the given ones.

    Raises:
        InputError: for names that are not the model's, wrong shapes, NaN or infinite values, a frozen parameter with
            a gradient, two different values for one parameter, or what is no gradient at all.
    """
    return sort_message(model, anything, before=before, missing=missing).gradient


def sort_message(model: nn.Module, anything: Any, *, before: Any = None, missing: Missing = "error") -> SortedMessage:
    """`as_gradient` with what was left out: the arguments and errors are the same."""
    if missing not in ("error", "unsent"):
        raise InputError(f'`missing` must be "error" or "unsent", got {missing!r}.')
    slots = _Slots(model)
    if before is None:
        return slots.sort(_named(slots, anything), missing, weights=False)
    start = slots.sort(_named(slots, before, weights=True), missing, weights=True)
    end = slots.sort(_named(slots, anything, weights=True), missing, weights=True)
    if start.unsent != end.unsent:
        raise InputError(f"`before` lacks the parameters {list(start.unsent)}, the weights after {list(end.unsent)}.")
    difference = {n: g - end.gradient[n] for n, g in start.gradient.items()}
    return SortedMessage(gradient=difference, unsent=end.unsent, buffers=end.buffers)


class _Slots:
    """The names under which a model holds its tensors."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"`model` must be an nn.Module, got {type(model).__name__}.")
        self.model = model
        first = {id(p): n for n, p in model.named_parameters()}
        #: Every name of a parameter, tied ones too, to the name that `named_parameters()` gives it.
        self.names = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        self.parameters = dict(model.named_parameters())
        self.trainable = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.buffers = {n for n, _ in model.named_buffers(remove_duplicate=False)}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, UninitializedParameter):
                raise InputError(f"Parameter {name!r} is lazy and has no shape yet: call the model on a batch first.")
        if not self.trainable:
            raise InputError("The model has no trainable parameter, so no message can hold its gradient.")
        self._bare: dict[str, set[str]] = {}
        for name in (*self.names, *self.buffers):
            self._bare.setdefault(unwrapped(name), set()).add(self.names.get(name, name))

    def find(self, name: str) -> str | None:
        """The model's own name of a parameter or buffer that a message calls `name`; `None` if it has none."""
        if name in self.names or name in self.buffers:
            return self.names.get(name, name)
        found = self._bare.get(unwrapped(name), set())
        if len(found) > 1:
            raise InputError(f"{name!r} could be any of {sorted(found)}: key the gradient as `named_parameters()`.")
        return next(iter(found), None)

    def sort(self, named: Mapping[str, Any], missing: Missing, *, weights: bool) -> SortedMessage:
        """What `named` holds for each parameter, checked."""
        what = "Weights" if weights else "Gradient"
        held: dict[str, tuple[str, Tensor]] = {}
        buffers, unexpected = [], []
        for given, value in named.items():
            name = self.find(given) if isinstance(given, str) else None
            if name is None:
                unexpected.append(given)
            elif name not in self.parameters:
                buffers += [name] if _holds_something(value) else []
            else:
                tensor = _tensor(what, name, value, self.parameters[name])
                if not weights and tensor.data_ptr() == self.parameters[name].data_ptr() != 0:
                    raise InputError(
                        f"What is given for {given!r} is the model's own parameter, not its gradient. Pass "
                        "`{n: p.grad for n, p in model.named_parameters()}`, or the model itself; for an update, the "
                        "weights after it and `before=`."
                    )
                if name in held and not torch.equal(held[name][1], tensor):
                    raise InputError(
                        f"{held[name][0]!r} and {given!r} are one parameter of the model, and the two values differ. "
                        "Give one of them."
                    )
                held[name] = (given, tensor)
        unsent = tuple(n for n in self.trainable if n not in held)
        if unexpected or (unsent and (missing == "error" or len(unsent) == len(self.trainable))):
            raise InputError(self._misfit(unsent if missing == "error" or not held else (), unexpected))
        if not weights:
            self._refuse_frozen(held)
        gradient = {n: held[n][1] for n in self.trainable if n in held}
        _refuse_broken(what, gradient)
        return SortedMessage(gradient=gradient, unsent=unsent, buffers=tuple(dict.fromkeys(buffers)))

    def _misfit(self, unsent: Iterable[str], unexpected: list[Any]) -> str:
        near = [n for u in unexpected[:5] for n in get_close_matches(str(u), list(self.names), n=1, cutoff=0.6)]
        hint = f" (did you mean {near}?)" if near else ""
        return (
            f"The gradient's names are not the model's: missing {list(unsent)[:5]}, unexpected {unexpected[:5]}{hint}. "
            "Key it as `model.named_parameters()`, trainable parameters only. A parameter that is sent beside the "
            "model (of a loss, of another module) must become part of `model`, or it would leave unmeasured; for "
            'parameters that are not sent, `as_gradient(..., missing="unsent")`.'
        )

    def _refuse_frozen(self, held: Mapping[str, tuple[str, Tensor]]) -> None:
        for name, (given, tensor) in held.items():
            if name not in self.trainable and tensor.count_nonzero():
                raise InputError(
                    f"{given!r} is frozen (`requires_grad=False`), but the message holds a gradient of it, which "
                    "would leave unmeasured. Set `requires_grad_(True)` on it, or leave it out of the message."
                )


def unwrapped(name: str) -> str:
    """`name` without the parts that wrappers put in: `"module._orig_mod.0.weight"` is `"0.weight"`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _named(slots: _Slots, anything: Any, *, weights: bool = False) -> Mapping[str, Any]:
    """`anything` as a dictionary whose values are still as given."""
    if isinstance(anything, nn.Module):
        if weights:
            return dict(anything.state_dict())
        found = {n: p.grad for n, p in anything.named_parameters() if p.requires_grad}
        if all(g is None for g in found.values()):
            raise InputError("No parameter of the module has a `.grad`: call `loss.backward()` first.")
        return found
    if isinstance(anything, Mapping):
        return anything
    if isinstance(anything, Tensor | np.ndarray):
        return _of_vector(slots, anything)
    if anything is None or isinstance(anything, str | bytes | Set) or not isinstance(anything, Iterable):
        way = "; sets have no order" if isinstance(anything, Set) else ""
        raise InputError(
            "A gradient is a dictionary keyed as `named_parameters()`, a list in parameter order, a vector of all "
            f"parameters' elements, or a module with `.grad`; got {type(anything).__name__}{way}."
        )
    values = list(anything)
    if values and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in values):
        if len({v[0] for v in values}) < len(values):
            raise InputError("The gradient's pairs (name, tensor) hold a name twice. Give each once.")
        return dict(values)
    return _of_list(slots, values)


def _of_vector(slots: _Slots, values: Tensor | np.ndarray) -> Mapping[str, Any]:
    """One array: the only parameter's, or all trainable parameters' elements in order."""
    total = sum(p.numel() for p in slots.trainable.values())
    if len(slots.trainable) == 1:
        ((name, parameter),) = slots.trainable.items()
        if tuple(values.shape) == tuple(parameter.shape):
            return {name: values}
    if tuple(values.shape) != (total,):
        raise InputError(
            f"One array must hold all {total} elements of the trainable parameters as a vector, got shape "
            f"{tuple(values.shape)}."
        )
    vector = values if isinstance(values, Tensor) else torch.from_numpy(_native(values))
    return unflatten(vector.to_dense() if vector.layout != torch.strided else vector, slots.trainable)


def _of_list(slots: _Slots, values: list[Any]) -> Mapping[str, Any]:
    """A list by order: trainable parameters, all parameters, or the state dictionary's tensors."""
    orders = {
        "trainable parameters": list(slots.trainable),
        "parameters": list(slots.parameters),
        "tensors in `state_dict()`": [n for n in slots.model.state_dict() if n in slots.names or n in slots.buffers],
    }
    for names in orders.values():
        if len(names) == len(values):
            return dict(zip(names, values, strict=True))
    counts = ", ".join(f"{len(names)} {what}" for what, names in orders.items())
    raise InputError(
        f"A list of {len(values)} tensors fits no order of the model's: it has {counts}. Put `None` where a parameter "
        "has no gradient, or pass a dictionary keyed as `named_parameters()`."
    )


def _native(array: np.ndarray) -> np.ndarray:
    """A copy that torch can read: in this machine's byte order, with positive strides, writable."""
    if array.dtype.kind not in "fiu":
        raise InputError(f"A gradient's numpy arrays must hold real numbers, got {array.dtype}.")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(np.int64 if array.dtype.kind == "u" else array.dtype.newbyteorder("="))


def _tensor(what: str, name: str, value: Any, parameter: Tensor) -> Tensor:
    """`value` as a dense tensor like `parameter`."""
    if value is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(_native(np.asarray(value)))
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise InputError(f"{what} {name!r}: {error}") from error
            raise InputError(f"{what} {name!r} is no tensor, but a {type(value).__name__}.") from error
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.dtype == torch.bool or value.is_complex() != parameter.is_complex():
        raise InputError(f"{what} {name!r} is {value.dtype}, the parameter {parameter.dtype}.")
    if tuple(value.shape) != tuple(parameter.shape):
        raise InputError(f"{what} {name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}.")
    if value.device != parameter.device and value.is_meta:
        raise InputError(
            f"{what} {name!r} is on meta, the model on {parameter.device}: a tensor on meta holds no values."
        )
    if value.is_inference() and not torch.is_inference_mode_enabled():
        value = value.clone()  # what was made in inference mode cannot take part in a derivative
    return value.to(device=parameter.device, dtype=torch.promote_types(value.dtype, parameter.dtype))


def _holds_something(value: Any) -> bool:
    if value is None:
        return False
    if isinstance(value, Tensor):
        return bool((value.to_dense() if value.layout != torch.strided else value).count_nonzero())
    return bool(np.any(np.asarray(value)))


def _refuse_broken(what: str, gradient: Gradient) -> None:
    # One number is read back from the device where all is well.
    if not torch.stack([torch.isfinite(g).all() for g in gradient.values()]).all():
        broken = [n for n, g in gradient.items() if not torch.isfinite(g).all()]
        raise InputError(
            f"{'The gradient of' if what == 'Gradient' else 'The weights'} {broken[0]!r} holds NaN or infinite values "
            f"({len(broken)} of {len(gradient)} tensors do). Nothing can be measured on it, and sending it would spoil "
            "the receiver's model."
        )
