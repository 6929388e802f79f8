"""What an attack sees, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.checks import check_gradient, check_labels, class_indices, index_targets
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.structures import Rest, map_rest
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything the threat model grants an attacker, and nothing of the truth.

    Args:
        loss_gradient: The model and the loss, as the server has them.
        sent: The gradient that was sent, one tensor per parameter: the batch's mean gradient, perturbed or not.
            Parameters that it does not name were not sent (frozen by agreement, encrypted): the attacker knows nothing
            of their gradient.
        input_shape: The shape of one example.
        batch_size: `B`, at least 1.
        labels: Class indices `(B,)` of any integer dtype, kept as int64, or, for a binary loss, float `(B, 1)`. `None`:
            the attacker does not have them. For a bound loss gradient (`LossGradient.bind`): the rest, targets and
            known inputs by name.
        num_classes: `C`, at least 1; `None` where the loss has no classes.
        value_range: `(low, high)` of valid inputs, which boxed attacks use; `None` if unknown.
        local: How the client trained, if it took several steps. `sent` is then their mean gradient (see
            `LocalTraining`), and gradient-matching attacks differentiate through the steps. Other attacks refuse.
        scale: The factor `c` in `sent = c g`, `g` the gradient of `loss_gradient`: another loss weight, a sum in the
            place of a mean, accumulated or clipped gradients, the learning rate of an update (negative). A number other
            than 0 is known to the attacker. `None` is unknown, and may have either sign.
        knowledge: What the sender's defense declares of the message, in the units of `sent`. Attacks that are made to
            (`gradguard.attacks.adaptive`) use it, others do not look at it.
        offset: What the attacker took off the message: the gradient of the examples that it knows. Steps of the defense
            that are not linear worked on the two together. `None`: nothing.

    Raises:
        InputError: A field is outside its range, or the sent gradient or the labels do not fit the model.
        UnsupportedModelError: What `LossGradient.check_model` raises.
    """

    loss_gradient: LossGradient
    sent: Gradient = field(repr=False)
    input_shape: tuple[int, ...]
    batch_size: int = 1
    labels: Rest | None = field(default=None, repr=False)
    num_classes: int | None = None
    value_range: tuple[float, float] | None = (0.0, 1.0)
    local: LocalTraining | None = None
    scale: float | None = 1.0
    knowledge: Knowledge | None = field(default=None, repr=False)
    offset: Gradient | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.loss_gradient, LossGradient):
            raise InputError(
                f"`loss_gradient` must be a `LossGradient(model, loss_fn)`, got {type(self.loss_gradient).__name__}."
            )
        if not _is_count(self.batch_size):
            raise InputError(f"`batch_size` must be at least 1, got {self.batch_size!r}; it is a whole number.")
        self._check_shape()
        if self.num_classes is not None and not _is_count(self.num_classes):
            raise InputError(f"`num_classes` must be a positive whole number or None, got {self.num_classes!r}.")
        self._check_numbers()
        if self.local is not None and not isinstance(self.local, LocalTraining):
            raise InputError(f"`local` must be a `LocalTraining` or None, got {type(self.local).__name__}.")
        if self.knowledge is not None and not isinstance(self.knowledge, Knowledge):
            raise InputError(
                f"`knowledge` must be a `Knowledge`, as `sent.knowledge` of a defense is, or None; got "
                f"{type(self.knowledge).__name__}."
            )
        self._check_label_tensor()
        self.loss_gradient.check_model()
        check_sent(self.sent, self.loss_gradient.parameters())

    def in_dtype(self, dtype: torch.dtype) -> Observation:
        """The same observation with model and gradient computed in `dtype`."""
        return replace(
            self,
            loss_gradient=self.loss_gradient.with_dtype(dtype),
            sent={n: g.to(dtype) for n, g in self.sent.items()},
            offset=None if self.offset is None else {n: g.to(dtype) for n, g in self.offset.items()},
        )

    @property
    def not_sent(self) -> tuple[str, ...]:
        """The names of the trainable parameters whose gradient was not sent."""
        return tuple(n for n in self.loss_gradient.parameters() if n not in self.sent)

    def at_unit_scale(self) -> Observation:
        """The same observation with a known factor divided out: `scale` is then 1, or `None` as before."""
        if self.scale is None or self.scale == 1.0:
            return self
        offset = None if self.offset is None else {n: g / self.scale for n, g in self.offset.items()}
        known = None if self.knowledge is None else self.knowledge.scaled(1 / self.scale)
        sent = {n: g / self.scale for n, g in self.sent.items()}
        return replace(self, sent=sent, scale=1.0, knowledge=known, offset=offset)

    def gradient(self, parameters: Gradient, inputs: Tensor, targets: Tensor) -> Gradient:
        """What the client would have sent for other data, as a pure function of `parameters`, `inputs` and `targets`.

        Args:
            parameters: One tensor per trainable parameter.
            inputs: `(B, *input_shape)`.
            targets: `(B, ...)`.

        Returns:
            The gradient of the loss, or the mean gradient of the client's local steps, one tensor per parameter;
                without the factor `scale`.
        """
        loss = self.loss_gradient.loss
        if self.local is not None:
            return self.local(loss, parameters, inputs, targets)
        return torch.func.grad(loss)(parameters, inputs, targets)

    def matching_loss(self, inputs: Tensor, labels: Tensor) -> float:
        """What every attack's candidates are compared by.

        Args:
            inputs: `(B, *input_shape)`.
            labels: As in the observation.

        Returns:
            `|c g(inputs) - sent|^2 / |sent|^2` over what was sent, see `match`.
        """
        return self.match(inputs, labels)[0]

    def match(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The matching loss of a candidate, and the factor `c` that it was taken with.

        Args:
            inputs: Shape `(B, *input_shape)`.
            labels: As in the observation.

        Returns:
            `|c g(inputs) - sent|^2 / |sent|^2` over the names that were sent, and `c`: the observation's `scale`, or
                where that is free the one that makes the loss least.
        """
        function = self.loss_gradient
        own = self._own(function.cast(inputs), function.cast(labels))
        pairs = [(own[n], g.to(own[n])) for n, g in self.sent.items()]
        square = torch.stack([g.square().sum() for _, g in pairs]).sum()
        scale = torch.tensor(1.0 if self.scale is None else self.scale, dtype=square.dtype, device=square.device)
        if self.scale is None:
            product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
            scale = product / torch.stack([a.square().sum() for a, _ in pairs]).sum().clamp_min(_tiny(square))
        gap = torch.stack([(scale * a - b).square().sum() for a, b in pairs]).sum()
        return (gap / square.clamp_min(_tiny(square))).item(), scale.item()

    def check(self) -> None:
        """Try the model on random examples of the given shape, and the loss on the given labels. Costs one forward
        pass.

        Raises:
            InputError: The shape does not go through the model, `num_classes` is not the number of its outputs, or the
                labels are out of range, on another device, or not what the loss takes.
        """
        function = self.loss_gradient
        if function.computing_dtype.itemsize < 4:
            function = function.with_dtype(torch.float32)  # not every layer has a half-precision kernel
        low, high = self.value_range or (-1.0, 1.0)
        shape = (self.batch_size, *self.input_shape)
        draw = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inputs = function.cast((low + (high - low) * draw).to(function.device, torch.float32)).detach()
        parameters = function.parameters()
        with torch.no_grad():
            with _asking(f"Examples of shape {shape} do not go through {type(function.model).__name__}"):
                if self.labels is None and function.is_bound:
                    return  # the known inputs beside the private one are in the labels' structure
                outputs = function.outputs(parameters, inputs, function.cast(self.labels))
            scores = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1
            if scores and self.num_classes not in (None, outputs.shape[1]):
                raise InputError(
                    f"The observation says `num_classes={self.num_classes}`, the model has {outputs.shape[1]} outputs. "
                    "Give the same number, or leave it out."
                )
            if self.labels is None:
                return
            if isinstance(outputs, Tensor) and isinstance(self.labels, Tensor) and not function.has_company:
                check_labels(outputs, self.labels, function.loss_fn)
            kind = "these labels"
            if isinstance(self.labels, Tensor):
                kind = f"labels of dtype {self.labels.dtype} and shape {tuple(self.labels.shape)}"
            with _asking(f"The loss {function.loss_fn} does not take {kind}"):
                function.loss_of(outputs, function.cast(self.labels))

    # ------------------------------------------------------------------ inside

    def _own(self, inputs: Tensor, targets: Tensor) -> Gradient:
        """The candidate's own gradient; without local steps by plain autograd, which takes any model."""
        parameters = self.loss_gradient.parameters()
        if self.local is not None:
            return self.gradient(parameters, inputs, targets)
        names = list(self.sent)
        leaves = {n: p.detach().requires_grad_(n in self.sent) for n, p in parameters.items()}
        with torch.enable_grad():
            loss = self.loss_gradient.loss(leaves, inputs.detach(), map_rest(torch.Tensor.detach, targets))
        found = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    def _check_shape(self) -> None:
        try:
            shape = tuple(self.input_shape)
        except TypeError:
            shape = ()
        is_bound = self.loss_gradient.is_bound  # an input of one number per example is one of several
        if not (shape or is_bound) or not all(_is_count(n) for n in shape):
            raise InputError(
                f"`input_shape` must be the shape of one example, positive whole numbers, got {self.input_shape!r}."
            )

    def _check_numbers(self) -> None:
        if self.value_range is not None:
            try:
                low, high = (float(v) for v in self.value_range)
            except (TypeError, ValueError):
                low, high = 0.0, 0.0
            if not -math.inf < low < high < math.inf:
                raise InputError(
                    f"`value_range` must be (low, high) with low < high, or None, got {self.value_range!r}."
                )
        scale = self.scale
        if scale is None:
            return
        if not isinstance(scale, Real) or not math.isfinite(scale) or scale == 0:
            raise InputError(
                f"`scale` must be a finite number other than 0, or None where it is unknown, got {scale!r}."
            )

    def _check_label_tensor(self) -> None:
        labels = self.labels
        if labels is None:
            return
        if isinstance(labels, dict) and self.loss_gradient.is_bound:
            object.__setattr__(self, "labels", map_rest(index_targets, labels))
            return
        if not isinstance(labels, Tensor):
            raise InputError(f"`labels` must be a tensor or None, got {type(labels).__name__}.")
        if labels.ndim == 0 or len(labels) != self.batch_size:
            count = len(labels) if labels.ndim else f"a single number, shape {tuple(labels.shape)}, for"
            raise InputError(f"`labels` must have one entry per example: {self.batch_size} examples, {count} labels.")
        if labels.device != self.loss_gradient.device:
            raise InputError(
                f"`labels` are on {labels.device}, the model on {self.loss_gradient.device}. Move one to the other."
            )
        if not labels.is_floating_point():
            object.__setattr__(self, "labels", class_indices(labels, "labels"))
        elif not torch.isfinite(labels).all():
            raise InputError("`labels` hold NaN or infinite values.")
        elif labels.ndim == 1 and self.num_classes is not None and _takes_indices(self.loss_gradient.loss_fn):
            class_indices(labels, "labels")  # says why not


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an attack came back with.

    Inputs are private data: they are in no `repr` and are written nowhere unless asked for.

    Args:
        attack: Its name.
        inputs: `(B, *input_shape)`; `None` for an attack on labels only.
        labels: As in `Observation`, given or recovered.
        label_counts: `(C,)` int64, for attacks that count labels.
        matching_loss: Squared distance between the candidate's gradient and the sent one, relative to the sent one's;
            NaN without inputs.
        converged: By the attack's own criterion.
        seconds: Wall clock.
        details: What the attack has to say beside (iterations, residuals, which trial won), plain numbers and strings.
    """

    attack: str
    inputs: Tensor | None = field(default=None, repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    label_counts: Tensor | None = field(default=None, repr=False)
    matching_loss: float = float("nan")
    converged: bool = False
    seconds: float = float("nan")
    details: dict[str, Any] = field(default_factory=dict)


def check_sent(sent: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Check a gradient that may lack some of the parameters.

    Args:
        sent: One tensor per parameter that was sent.
        parameters: All of the model's trainable ones.

    Raises:
        InputError: It is empty, names what is no parameter, or holds tensors of another shape or device, of no
            floating-point dtype, sparse ones, or values that are not finite.
    """
    if not isinstance(sent, Mapping):
        raise InputError(f"A gradient is a dictionary keyed as `named_parameters()`, got {type(sent).__name__}.")
    if not sent:
        raise InputError(
            "The sent gradient is empty: nothing was sent, so nothing can be learnt. Give the tensors that left the "
            "client, keyed as `model.named_parameters()`."
        )
    for name, value in sent.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"The gradient of {name!r} must be a floating-point tensor, got {kind}.")
        if value.is_sparse or value.layout != torch.strided:
            raise InputError(f"The gradient of {name!r} is sparse ({value.layout}). Use `.to_dense()`.")
    known = {n: p for n, p in parameters.items() if n in sent}
    if len(known) == len(sent):
        check_gradient(sent, known)
        return
    check_gradient({n: g for n, g in sent.items() if n not in parameters} | known, parameters)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _takes_indices(loss_fn: object) -> bool:
    """Whether a loss is known to take class indices where targets have one axis."""
    functional = (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss)
    return isinstance(loss_fn, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)) or loss_fn in functional


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Whatever a user's model or loss raises within becomes an `InputError`; memory errors and ours pass."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {error}") from error
