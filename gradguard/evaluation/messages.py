"""A message that is about to be sent, read against the batch it is of: what it is, and what of it an attacker knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.defenses import Defense
from gradguard.defenses.coverage import Covered
from gradguard.errors import ForeignMessageError, InputError
from gradguard.evaluation.batches import example_weights
from gradguard.evaluation.differences import ARITHMETIC, Difference, compare, listed, seen_by_attacker
from gradguard.functional.as_gradient import Missing, sort_message
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.local_training import LocalTraining
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.reach import unreached_parameters
from gradguard.functional.structures import rows_of
from gradguard.functional.vectors import Gradient, norm
from gradguard.report import Verdict

#: A message that is farther than this from all that explains it is taken for one of another batch or other weights.
#: Measured on digits with three networks, new and trained: other batches and other initialisations are 0.5 to 50 away,
#: an undeclared proximal term 0.1 to 0.3, the rounding of mixed precision below 0.05.
FOREIGN = 0.5


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message and what it is of. Gradients have one tensor per parameter.

    Args:
        given: What it holds.
        expected: What it was declared to be, without noise.
        known: `given` less the noise that it was declared to hold.
        true: The gradient of the batch that it is of, which measures and attacks are about.
        inputs: That batch, `(B, *input_shape)`.
        targets: Of that batch, `(B, ...)`.
        difference: By what `given` differs from `expected`.
        amplification: Of `true` in `expected` (`LocalTraining.amplification`).
        noise_declared: Whether what it differs by is taken for noise.
        sentences: For people, on everything that is no plain gradient.
        beside: Trainable parameters of the loss, which no message of the model's holds.
        dropped: Buffers that it held.
    """

    given: Gradient
    expected: Gradient
    known: Gradient
    true: Gradient
    inputs: Tensor
    targets: Tensor
    difference: Difference
    amplification: float = 1.0
    noise_declared: bool = False
    sentences: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def in_gradient_units(self) -> Gradient:
        """The message without its factors: what a defense must perturb.

        Else noise `J^T d` on tensors of different factors would tell of a different `d` in each, and two of them give
        the input away.

        Returns:
            One tensor per parameter that it holds.
        """
        return {n: g / self.difference.factors.get(n, 1.0) for n, g in self.given.items()}

    def in_its_own(self, protected: Gradient, *, masked: bool = True) -> Gradient:
        """A protected message in the message's own units: with its factors, and zero where the message is masked.

        A mask is known, so noise on a masked element would be seen bare, and the rest of `J^T d` follows from it.

        Args:
            protected: In gradient units, one tensor per parameter that the message holds.
            masked: `False` leaves the noise on masked elements. That is what is judged, since an attacker who sees more
                is judged by more.

        Returns:
            What to send, one tensor per parameter that the message holds.
        """
        sent = {}
        for name, given in self.given.items():
            sent[name] = protected[name] * self.difference.factors.get(name, 1.0)
            if masked:
                sent[name] = sent[name].masked_fill((given == 0) & (self.expected[name] != 0), 0.0)
        return sent

    def seen(self, sent: Gradient, *, fill_unsent: bool = True) -> Gradient:
        """What an attacker who knows all but the noise makes of `sent`.

        Args:
            sent: In the message's own units.
            fill_unsent: Grant the true values of what was not sent; `False` leaves those names out.

        Returns:
            One tensor per parameter, in units of the batch's gradient.
        """
        return seen_by_attacker(
            self.difference,
            self.true,
            self.known,
            sent,
            amplification=self.amplification,
            fill_unsent=fill_unsent,
        )

    def named(self, verdict: Verdict) -> Verdict:
        """`verdict` with what the message is."""
        return replace(verdict, looks_like=self.difference.looks_like, explanation=self.sentences)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a verdict in favour does not speak of."""
        found = []
        if self.beside:
            found.append(
                f"the loss has parameters of its own ({listed(self.beside)}): they are not part of this message, and "
                "their gradient must not be sent beside it as it is"
            )
        return tuple(found)


def bare_tensors(message: Message) -> tuple[str, ...]:
    """Complaints about tensors that nothing here measures, one for each kind that the message holds."""
    complaints = []
    if message.difference.unreached:
        complaints.append(
            f"{listed(message.difference.unreached)} would leave bare: not reached by `loss_fn(model(inputs), "
            "targets)`, so what they give away is not measured"
        )
    if message.dropped:
        complaints.append(f"the buffers {listed(message.dropped)} would leave bare: they are no part of a gradient")
    return tuple(complaints)


def covered_sentences(message: Message, covered: Covered) -> tuple[str, ...]:
    """What a verdict says of tensors that got noise, but are not measured."""
    names = tuple(n for n in message.given if n in covered.bare or n in message.difference.unreached)
    if not names:
        return ()
    return (
        f"the defense does not reach {listed(names)} through the loss measured: covered by isotropic noise at the same "
        "ratio, what they give away is not measured",
    )


def read_message(
    loss_gradient: LossGradient,
    inputs: Tensor,
    targets: Tensor,
    message: Any = None,
    *,
    training: LocalTraining | None = None,
    declared: Defense | None = None,
    missing: Missing = "error",
    foreign: float = FOREIGN,
) -> Message:
    """What `message` is, or an error that says what it looks like.

    Args:
        loss_gradient: the model, at the weights that the message was computed at, and the loss.
        inputs: shape `(B, *input_shape)`; all examples that the message is of.
        targets: shape `(B, ...)`.
        message: anything that `as_gradient` takes. `None`: the batch's gradient, or what `training` makes of it.
        training: how the client trained, if the message is an update (of either sign and any scale) or the gradient of
            a regularised loss.
        declared: the defense that the message went through already; its difference then counts as that noise.
        missing: "error" refuses a message that lacks parameters, "unsent" counts them as not sent.
        foreign: the largest distance that is still taken for the message of this batch at these weights.

    Returns:
        The message, read.

    Raises:
        ForeignMessageError: for a message that is not of this batch at these weights; it says what it looks like.
        InputError: for what no gradient can be.
    """
    if not foreign >= 0:
        raise InputError(f"`foreign` must be a distance of at least 0, got {foreign}.")
    sorted_message = None if message is None else sort_message(loss_gradient.model, message, missing=missing)
    loss_gradient.check_batch(inputs, targets)
    amplification, used = 1.0, len(inputs)
    if training is not None:
        used = training.examples_used(len(inputs))
        inputs, targets = inputs[:used], rows_of(targets, slice(used))
        amplification = training.amplification(used)
    true = loss_gradient(inputs, targets)
    expected = true if training is None else training.mean_gradient(loss_gradient, inputs, targets)
    given = expected if sorted_message is None else sorted_message.gradient
    unreached = unreached_parameters(loss_gradient, inputs, targets)
    difference = compare(expected, given, parameters=loss_gradient.parameters(), unreached=unreached)
    read = Message(
        given=given,
        expected=expected,
        known=given,
        true=true,
        inputs=inputs,
        targets=targets,
        difference=difference,
        amplification=amplification,
        sentences=difference.details,
        beside=loss_parameters(loss_gradient),
        dropped=() if sorted_message is None else sorted_message.buffers,
    )
    if declared is not None:
        return _with_noise(replace(read, known=expected), loss_gradient, declared)
    if training is not None and difference.looks_like in ("factor", "update") and difference.distance <= ARITHMETIC:
        # `after - before` and `before - after` are the mean gradient times a learning rate and a number of steps.
        return replace(read, sentences=_update_sentences(training, difference))
    return _explained_by_examples(read, loss_gradient, training, foreign)


def loss_parameters(loss_gradient: LossGradient) -> tuple[str, ...]:
    """Trainable parameters of the loss that are not the model's: nothing here measures or covers them."""
    loss_fn = loss_gradient.loss_fn
    if not isinstance(loss_fn, nn.Module):
        return ()
    own = {id(p) for p in loss_gradient.model.parameters()}
    return tuple(n for n, p in loss_fn.named_parameters() if p.requires_grad and id(p) not in own)


# ---------------------------------------------------------------------- inside


def _update_sentences(training: LocalTraining, difference: Difference) -> tuple[str, ...]:
    scale = training.steps * training.learning_rate
    kind = "after - before" if difference.factor < 0 else "before - after"
    if abs(abs(difference.factor) / scale - 1) <= ARITHMETIC:
        first = f"it is the declared update, {kind}"
    else:
        first = (
            f"it is {difference.factor:.3g} times the mean gradient of the declared training, where learning rate and "
            f"steps make {scale:.3g}; a factor hides nothing"
        )
    return (first, *(d for d in difference.details if "looks like an update" not in d and "times the true" not in d))


def _explained_by_examples(
    read: Message, loss_gradient: LossGradient, training: LocalTraining | None, foreign: float
) -> Message:
    """`read` if it is of this batch, perhaps with other weights of its examples; else an error."""
    difference = read.difference
    if difference.looks_like == "nothing":
        raise ForeignMessageError(
            "The message holds nothing of the batch's gradient: every tensor of it that the loss reaches is zero or "
            "not there. " + _WAYS
        )
    if difference.looks_like == "update":
        raise ForeignMessageError(_looks_like_an_update(difference, training))
    if difference.looks_like != "unexplained":
        return read
    part = {n: read.given[n] for n in difference.factors}
    found = example_weights(loss_gradient, read.inputs, read.targets, part)
    if found is not None and found.distance <= 0.02:
        present = found.present()
        if len(present) < len(found.weights):
            raise ForeignMessageError(_looks_like_a_part(present, len(found.weights), found.weights))
        if min(found.weights) > 0:
            return _reweighted(read, found.weights)
    if difference.factor <= 0 or difference.distance > foreign:
        raise ForeignMessageError(_looks_foreign(difference, training))
    return read


def _reweighted(read: Message, weights: Sequence[float]) -> Message:
    """Every example counts, each by a weight of its own: the largest is what its attacker divides the noise by."""
    largest = abs(read.difference.factor) * max(weights) * len(weights) / sum(weights)
    difference = replace(read.difference, factors=dict.fromkeys(read.difference.factors, largest))
    sentence = (
        f"the examples weigh from {min(weights):.3g} to {max(weights):.3g} in it, as after clipping per example or in "
        "batches of other sizes; such weights hide nothing"
    )
    kept = tuple(d for d in read.sentences if "cannot explain" not in d)
    return replace(read, difference=difference, sentences=(sentence, *kept))


def _with_noise(read: Message, loss_gradient: LossGradient, declared: Defense) -> Message:
    """`read` with its difference taken for a draw of `declared`, if it can be one."""
    expected = read.known
    noise = {n: (g - expected[n]).to(expected[n]) for n, g in read.given.items()}
    jacobian = InputJacobian(loss_gradient, read.inputs, read.targets) if declared.needs_jacobian else None
    base = {n: expected[n] for n in read.given}
    first, second = (
        declared.checked_perturbation(base, jacobian, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    if all(torch.equal(first[n], second[n]) for n in first):
        raise InputError(
            f"{declared.name} draws nothing at random, so what it does hides nothing and needs no declaration: leave "
            "`declared` out."
        )
    size, usual = norm(noise).item(), norm(first).item()
    aligned = sum((noise[n] * base[n]).sum().item() for n in noise) / max(size * norm(base).item(), 1e-300)
    drawn = sum((first[n] * base[n]).sum().item() for n in noise) / max(usual * norm(base).item(), 1e-300)
    if not 0.5 <= size / max(usual, 1e-300) <= 2 or abs(aligned) > abs(drawn) + 0.3:
        raise InputError(
            f"The message differs from the batch's gradient by {size:.3g}, along it with cosine {aligned:.2f}; noise "
            f"of {declared} has about {usual:.3g} and cosine {drawn:.2f}. So the difference is not only that noise: "
            "check the batch, the weights, factors, and what was declared."
        )
    return replace(
        read,
        difference=replace(
            read.difference,
            looks_like="gradient",
            factor=1.0,
            factors=dict.fromkeys(read.difference.factors, 1.0),
            distance=size / max(norm(base).item(), 1e-300),
        ),
        noise_declared=True,
        sentences=(f"its noise is taken on your word for a secret draw of {declared}",),
    )


_WAYS = (
    "Check that the model holds the weights the message was computed at, that `inputs` and `targets` are all examples "
    "of it and no others, and the loss. Several local steps, momentum or a regulariser are declared by "
    "`training=LocalTraining(...)`, noise that is already in it by `declared=`."
)


def _looks_like_an_update(difference: Difference, training: LocalTraining | None) -> str:
    size = -difference.factor
    if training is not None:
        return (
            f"The message looks like an update, but not like that of {training}: it is {difference.factor:.3g} times "
            f"its mean gradient up to {difference.distance:.2g} of its norm, which is more than arithmetic. " + _WAYS
        )
    if difference.distance <= ARITHMETIC:
        what = (
            f"The message looks like an update, not a gradient: it is {difference.factor:.3g} times the batch's "
            f"gradient, one step of SGD with a learning rate of {size:.3g}. Declare it: "
            f"`training=LocalTraining(steps=1, learning_rate={size:.3g})`"
        )
    else:
        what = (
            f"The message looks like an update of several local steps, not a gradient: it points against the batch's "
            f"gradient (cosine {difference.cosine:.2f}, learning rate times steps about {size:.3g}). Declare it: "
            "`training=LocalTraining(steps=..., learning_rate=...)`"
        )
    return what + ", or negate it, if it is a gradient whose sign was turned."


def _looks_like_a_part(present: Sequence[int], count: int, weights: Sequence[float]) -> str:
    run = list(range(present[0], present[-1] + 1)) == list(present)
    which = f"{present[0]} to {present[-1]}" if run and len(present) > 1 else ", ".join(map(str, present[:10]))
    sign = " times a negative factor" if max(weights) <= 0 else ""
    return (
        f"The message is not of this batch: it looks like the gradient of {len(present)} of the {count} examples alone "
        f"(number {which}, counted from 0){sign}. Give exactly the examples that it was computed of."
    )


def _looks_foreign(difference: Difference, training: LocalTraining | None) -> str:
    declared = "the batch's gradient" if training is None else f"what {training} makes of the batch"
    turned = "an update of local training, " if difference.factor < 0 else "an update of several local steps, "
    return (
        f"The message is not {declared} at these weights: it differs from it by {difference.distance:.3g} of its norm "
        f"(cosine {difference.cosine:.2f}). It looks like the message of another batch or of other weights, or "
        f"{turned if training is None else ''}noise or terms of the loss that were not declared. " + _WAYS
    )
