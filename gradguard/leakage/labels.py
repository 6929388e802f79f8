"""How much of a batch's labels was told: the three numbers of label restoration (Ma et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.checks import class_indices


@dataclass(frozen=True, kw_only=True)
class LabelRecovery:
    """Three shares in [0, 1], 1 where everything was recovered (Ma et al., ICLR 2023).

    `le_acc` and `ln_acc` run over all classes, absent ones included. Where most classes are absent, an answer of "no
    class at all" scores nearly 1 (0.976 and more at `C = 1000`, `B = 24`). Read them beside `i_rec`, which is 0 there.
    In turn `i_rec` rewards an answer of more than `B` labels; counts that sum to `B` cannot gain by that.

    Args:
        le_acc: Label existence accuracy: the share of the `C` classes whose presence or absence was recovered rightly.
        ln_acc: Label number accuracy: the share of the `C` classes whose count was recovered rightly.
        i_rec: Instance recall, `sum_c min(n_hat_c, n_c) / B`: the share of the examples whose label was recovered.
    """

    le_acc: float
    ln_acc: float
    i_rec: float


def label_recovery(recovered: Tensor, true: Tensor) -> LabelRecovery:
    """Score recovered label counts against the true ones. The conventions are those of the paper's code.

    Args:
        recovered: Examples per class, shape `(C,)`; whole numbers.
        true: Examples per class, shape `(C,)`; whole numbers.

    Returns:
        The three shares.

    Raises:
        InputError: If the shapes differ, a count is negative or not a whole number, or the batch is empty.
    """
    for name, counts in (("recovered", recovered), ("true", true)):
        _check_counts(name, counts)
    if recovered.shape != true.shape:
        raise InputError(
            f"`recovered` counts {len(recovered)} classes, `true` {len(true)}: they must be the same classes."
        )
    recovered, true = recovered.cpu().double(), true.cpu().double()
    if not true.sum() > 0:
        raise InputError("`true` counts no example at all; there is nothing to recover from an empty batch.")
    return LabelRecovery(
        le_acc=((recovered > 0) == (true > 0)).double().mean().item(),
        ln_acc=(recovered == true).double().mean().item(),
        i_rec=(torch.minimum(recovered, true).sum() / true.sum()).item(),
    )


def count_labels(labels: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs in a batch.

    Args:
        labels: Class indices, shape `(B,)`, integers of any width.
        num_classes: Number of classes `C`, at least 1.

    Returns:
        Shape `(C,)`, int64, on the labels' device.

    Raises:
        InputError: If a label is not a class index `0 .. num_classes - 1`.
    """
    labels = class_indices(labels, "labels")
    if labels.ndim != 1:
        raise InputError(f"`labels` must be class indices of shape (B,), got shape {tuple(labels.shape)}.")
    if not isinstance(num_classes, Integral) or num_classes < 1:
        raise InputError(f"`num_classes` must be a positive whole number, got {num_classes!r}.")
    if ((labels < 0) | (labels >= num_classes)).any():
        raise InputError(
            f"`labels` go from {int(labels.min())} to {int(labels.max())}; with {num_classes} classes they must lie in "
            f"0 .. {num_classes - 1}."
        )
    return torch.bincount(labels, minlength=num_classes)


def _check_counts(name: str, counts: Tensor) -> None:
    """Raises `InputError` unless `counts` is a vector of whole numbers, none of them negative."""
    if not isinstance(counts, Tensor) or counts.ndim != 1 or counts.numel() == 0:
        shape = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise InputError(f"`{name}` must be a tensor of shape (C,), examples per class, got {shape}.")
    wrong = ~torch.isfinite(counts) | (counts < 0) | (counts != counts.round())
    if wrong.any():
        raise InputError(f"`{name}` must hold whole numbers of examples, none negative, got {counts[wrong][0].item()}.")
