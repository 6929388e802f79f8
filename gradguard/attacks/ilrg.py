"""Attacks on the labels alone: how many examples of each class a batch holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.attacks._labels.classification_head import ClassificationHead, observed_head
from gradguard.attacks._labels.counts import idlg_label, labels_of, restore_label_counts, sparsified
from gradguard.attacks._labels.inference import solve_observed_system
from gradguard.attacks._labels.scale import free_scale_label, restore_counts_and_scale, single_scale
from gradguard.attacks._options import check_numbers, check_whole
from gradguard.attacks.base import Attack
from gradguard.errors import InputError
from gradguard.threats.observation import Observation, Reconstruction


@dataclass(frozen=True, kw_only=True)
class ILRG(Attack):
    """Ma et al. 2023, "Instance-wise batch label restoration via gradients in federated learning" (ICLR).

    From the gradient of the last layer, weight and bias: `label_counts` `(C,)` that sum to the batch size, and `labels`
    `(B,)` with each class as often, in ascending order. The attacker knows the model and the batch size, and neither
    inputs nor labels. It has converged if the solution rounds to non-negative integers of the right sum without being
    pushed. It differs from the authors' code in: counts always sum to the batch size (theirs are rounded class by
    class).

    `details` has these entries:

    - `residual`: relative distance of the last layer's gradient from the one that the answer explains.
    - `refinement`: which answer won, 0 for the paper's.
    - `rounding`: largest change by rounding, in examples.
    - `certainty`: mean over the present classes of their largest probability. It is near `1/C` on an untrained model,
    and near 1 on a trained one, where the method's approximation breaks.
    - `scale`: the factor of the sent gradient, found with the counts where the observation leaves it free.
    - `scale_identified`: false where another factor with other counts explains the gradient as well.

    Args:
        refinements: At least 0; 0 is the paper's method. More let it try as many better-conditioned estimates of the
            features per class, and the answer that explains the last layer's gradient best is kept (see
            `restore_label_counts`).

    Raises:
        InputError: If `refinements` is negative.
    """

    recovers_inputs: ClassVar[bool] = False
    takes_missing_gradients: ClassVar[bool] = True
    takes_free_scale: ClassVar[bool] = True

    refinements: int = 2

    def __post_init__(self) -> None:
        check_numbers(refinements=self.refinements)
        if self.refinements < 0:
            raise InputError(f"`refinements` must not be negative, got {self.refinements}. 0 is the published method.")
        check_whole(0, refinements=self.refinements)

    def check(self, observation: Observation) -> None:
        """A head with a bias, under a mean cross-entropy, whose gradient is not zero."""
        observed_head(observation, needs_bias=True)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """Closed form; `generator` is not used."""
        head = observed_head(observation, needs_bias=True)
        assert head.bias is not None  # `observed_head` has made sure
        parameters, sent = observation.loss_gradient.parameters(), observation.sent
        restore = restore_label_counts if observation.scale is not None else restore_counts_and_scale
        found = restore(
            sent[head.weight],
            sent[head.bias],
            parameters[head.weight],
            parameters[head.bias],
            observation.batch_size,
            refinements=self.refinements,
        )
        rounding = (found.solution - found.counts).abs().max().item()
        return Reconstruction(
            attack=self.name,
            labels=labels_of(found.counts),
            label_counts=found.counts,
            converged=rounding < 0.5 and found.identified,
            details={
                "scale": found.scale,
                "scale_identified": found.identified,
                "residual": found.mismatch,
                "refinement": found.refinement,
                "rounding": rounding,
                "certainty": found.probabilities[found.counts > 0].amax(1).mean().item(),
            },
        )


@dataclass(frozen=True, kw_only=True)
class LabelSystem(Attack):
    """Label counts on trained models too, with or without a bias in the head: ours, see `solve_label_system`.

    It knows and returns what `ILRG` does. Where iLRG's answer explains the head's gradient it is the answer. Otherwise,
    and if the gradient's rank leaves room (a batch smaller than the number of classes), classes are told by linear
    programs and examples are solved one by one; what nothing is certain about is shared out. It has converged if iLRG's
    answer was kept, or nothing had to be shared out. A gradient whose small elements were set to 0 is no longer the
    system that is solved: iLRG answers.

    `details` has these entries:

    - `examples`, `classes`, `guessed`: how many labels belong to solved examples, to classes told to be there, and to
    neither.
    - `residual`: what iLRG's answer leaves unexplained.
    - `sparsified`: whether the gradient is.
    - `scale`, `scale_identified`: as in `ILRG`.

    Args:
        trust: The share of the head's gradient that iLRG's answer may leave unexplained and be kept; not negative. 0
            always solves the system.
        rounds: Of solving and subtracting, at least 0; 0 tells classes only.

    Raises:
        InputError: If a value is negative.
    """

    recovers_inputs: ClassVar[bool] = False
    takes_missing_gradients: ClassVar[bool] = True
    takes_free_scale: ClassVar[bool] = True

    trust: float = 0.05
    rounds: int = 8

    def __post_init__(self) -> None:
        check_numbers(trust=self.trust, rounds=self.rounds)
        if not self.trust >= 0:
            raise InputError(f"`trust` must not be negative, got {self.trust}. 0 solves the system always.")
        if self.rounds < 0:
            raise InputError(f"`rounds` must not be negative, got {self.rounds}. 0 tells classes only.")
        check_whole(0, rounds=self.rounds)

    def check(self, observation: Observation) -> None:
        """A head, with or without a bias, under a mean cross-entropy, whose gradient is not zero."""
        observed_head(observation, needs_bias=False)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """`generator`: of the starts (default: seed 0)."""
        head = observed_head(observation, needs_bias=False)
        sparse = sparsified(observation.sent[head.weight])
        trust = math.inf if sparse else self.trust
        found, scale, certain = solve_observed_system(
            observation, head, trust=trust, rounds=self.rounds, generator=generator
        )
        return Reconstruction(
            attack=self.name,
            labels=labels_of(found.counts),
            label_counts=found.counts,
            converged=not sparse and certain and (found.guessed == 0 or found.mismatch <= self.trust),
            details={
                "residual": found.mismatch,
                "sparsified": sparse,
                "examples": found.examples,
                "classes": found.classes,
                "guessed": found.guessed,
                "scale": scale,
                "scale_identified": certain,
            },
        )


@dataclass(frozen=True, kw_only=True)
class IDLGLabel(Attack):
    """Zhao, Mopuri & Bilen 2020, "iDLG": the label of a single example from the signs of the last layer's gradient.

    Works without a bias too, from three classes on. Converged: exactly one sign is negative, as it is in an
    unperturbed gradient (told from the bias; without one, always).
    """

    recovers_inputs: ClassVar[bool] = False
    takes_missing_gradients: ClassVar[bool] = True
    takes_free_scale: ClassVar[bool] = True

    def check(self, observation: Observation) -> None:
        """Refuse what the rule does not hold for.

        Args:
            observation: Must be of one example, with a head under a mean cross-entropy; three classes if the head has
                no bias.

        Raises:
            InputError: If there are more examples, or the loss or the gradient is of another kind.
            UnsupportedModelError: If the model has no such head.
        """
        if observation.batch_size != 1:
            raise InputError(
                f"iDLG's rule tells the label of one example, not of {observation.batch_size}. Use ILRG for a batch."
            )
        head = observed_head(observation, needs_bias=False)
        if head.bias is None and head.num_classes < 3:
            raise InputError(
                "With two classes and no bias in the head, the gradient's signs do not tell the label. "
                "Use `nn.Linear(..., bias=True)`."
            )

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """Closed form; `generator` is not used."""
        head = observed_head(observation, needs_bias=False)
        slopes = observation.sent[head.bias] if head.bias is not None else None
        if observation.scale is not None:
            label = idlg_label(observation.sent[head.weight], slopes)
        else:
            label = free_scale_label(observation.sent[head.weight], slopes)
        negative = None if slopes is None else int((slopes * -slopes[label].sign() < 0).sum())
        return Reconstruction(
            attack=self.name,
            labels=label[None],
            label_counts=F.one_hot(label, head.num_classes),
            converged=negative is None or negative == 1,
            details={} if slopes is None else {"scale": self._scale(observation, head, label)},
        )

    def _scale(self, observation: Observation, head: ClassificationHead, label: Tensor) -> float:
        """The factor of the gradient: known, or from the example's features."""
        if observation.scale is not None or head.bias is None:
            return 1.0
        parameters, sent = observation.loss_gradient.parameters(), observation.sent
        return single_scale(label, sent[head.weight], sent[head.bias], parameters[head.weight], parameters[head.bias])
