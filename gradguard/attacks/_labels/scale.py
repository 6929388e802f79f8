"""Label counts where the factor of the sent gradient is unknown: the factor is found with them.

The head sends `c grad W` and `c grad b` with a `c` of either sign that the attacker does not know. Quotients of the
two, which iLRG's features per class are, do not depend on it. The counts are then a line, `n(t) = n(0) + t n'` with
`t = 1/c`: the linear system of the counts leaves one direction open, that of the scores' mean probabilities, and the
sum of the counts, `B`, ties the line to it. What picks the point on the line: counts are whole numbers, none is
negative, and with fewer examples than classes some are 0. So the rarest class has `k = 0, 1, ...` examples, each `k`
gives a `t`, and the `t` whose counts explain the head's gradient best is kept. All of this is ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradguard.attacks._labels.counts import (
    RestoredCounts,
    class_embeddings,
    class_probabilities,
    idlg_label,
    restore_label_counts,
    round_counts,
    solve_label_counts,
)
from gradguard.attacks._labels.space import HeadSpace, head_space, possible_classes
from gradguard.attacks._labels.system import (
    SystemCounts,
    example_starts,
    single_examples,
    solve_label_system,
    stand_in_slopes,
)
from gradguard.errors import InputError

#: How many numbers of examples of the rarest class are tried.
MOST_RAREST = 64
#: How often a factor is fitted again to the counts that it gave.
REFITS = 5
#: Another factor explains the gradient as well if it leaves at most this many times as much unexplained.
AMBIGUOUS = 2.0


def free_scale_label(weight_gradient: Tensor | None, bias_gradient: Tensor | None) -> Tensor:
    """`idlg_label` for a gradient of unknown sign: shape `()`, int64.

    Of `p - onehot(y)` the label's entry is the largest in absolute value, the sum of all others. The weight's rule
    (`idlg_label`) does not see the sign. With two classes both entries are equally large: raises `InputError`.
    """
    rows = bias_gradient if bias_gradient is not None else weight_gradient
    if rows is not None and len(rows) < 3:
        raise InputError(
            "With two classes and an unknown factor of the sent gradient, which may be negative, the label cannot be "
            "told: both fit. Give the factor (`Observation(scale=...)`)."
        )
    if bias_gradient is not None:
        return bias_gradient.abs().argmax()
    return idlg_label(weight_gradient)


def single_scale(
    label: Tensor, weight_gradient: Tensor, bias_gradient: Tensor, weight: Tensor, bias: Tensor | None
) -> float:
    """The factor of one example's gradient: its features are a quotient, and give the probabilities at factor 1."""
    gradient, slopes = weight_gradient.double(), bias_gradient.double()
    features = gradient[label] / slopes[label]
    scores = weight.double() @ features + (0 if bias is None else bias.double())
    expected = scores.softmax(0)
    expected[label] -= 1
    return float((slopes @ expected) / expected.square().sum().clamp_min(torch.finfo(expected.dtype).tiny))


def restore_counts_and_scale(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    batch_size: int,
    *,
    refinements: int = 2,
) -> RestoredCounts:
    """`restore_label_counts` for gradients times an unknown factor, which comes back as `scale`.

    `identified` is false where another factor with other counts explains the head's gradient as well.
    """
    gradient, slopes, w, b = (t.detach().double() for t in (weight_gradient, bias_gradient, weight, bias))
    probabilities = class_probabilities(class_embeddings(gradient, slopes), w, b)
    start = solve_label_counts(probabilities, torch.zeros_like(slopes), batch_size)
    # In units of the slopes, so that t is about 1 whatever the factor.
    unit = slopes.abs().sum().clamp_min(torch.finfo(slopes.dtype).tiny)
    slope = solve_label_counts(probabilities, slopes / unit, batch_size) - start
    answers = []
    for t in _candidates(start, slope, batch_size):
        factor = float(unit) / t
        for _ in range(REFITS):
            found = restore_label_counts(gradient / factor, slopes / factor, w, b, batch_size, refinements=refinements)
            answers.append(replace(found, scale=factor))
            counts = found.counts.to(slopes)
            own = (found.probabilities.T @ counts - counts) / batch_size
            refit = float(slopes @ own / own.square().sum().clamp_min(torch.finfo(own.dtype).tiny))
            if refit * factor <= 0 or abs(refit - factor) < 1e-3 * abs(factor):
                break
            factor = refit
    if not answers:
        found = restore_label_counts(gradient, slopes, w, b, batch_size, refinements=refinements)
        return replace(found, identified=False)
    answers.sort(key=lambda answer: answer.mismatch)
    best = answers[0]
    rivals = [a for a in answers[1:] if not torch.equal(a.counts, best.counts)]
    return replace(best, identified=all(a.mismatch > AMBIGUOUS * best.mismatch + 1e-9 for a in rivals))


def _candidates(start: Tensor, slope: Tensor, batch_size: int) -> list[float]:
    """The `t`, of either sign, at which the rarest class of `start + t slope` has a whole number of examples."""
    found = []
    for sign in (1.0, -1.0):
        falling = sign * slope < -1e-9 * slope.abs().max()
        if not bool(falling.any()):
            continue
        heights, rates = start[falling], -sign * slope[falling]
        for k in range(min(batch_size // len(start), MOST_RAREST) + 1):
            t = sign * float(((heights - k) / rates).min())
            if t * sign <= 0:
                break
            for _ in range(3):  # of all classes, not of the rarest alone
                counts = round_counts(start + t * slope, batch_size).to(start)
                t = float((counts - start) @ slope / (slope @ slope))
                if t == 0:
                    break
            if t != 0 and t == t:
                found.append(t)
    return found


def example_scale(space: HeadSpace, batch_size: int, generator: torch.Generator, *, nonnegative: bool) -> float | None:
    """The factor from examples that are solved one by one; `None` if none is.

    Whether a solution is an example does not depend on the factor `c`; how many copies it stands for comes out as
    `c k`, and most examples are there once.
    """
    classes = torch.nonzero(possible_classes(space))[:, 0]
    if not len(classes) or not 0 < space.rank < len(space.scores) - 1:
        return None
    labels, starts = example_starts(space, classes, (2.0, 6.0), 0.0, generator)
    labels, starts = labels.repeat(2), torch.cat([starts, -starts])  # the factor's sign is unknown, too
    found = single_examples(space, labels, starts, batch_size, nonnegative=nonnegative)
    sure = (found.residuals < 1e-3) & (found.equations >= space.rank + 2) & torch.isfinite(found.copies)
    copies = found.copies[sure & (found.copies != 0)]
    if not len(copies):
        return None
    ratios = copies[None, :] / copies[:, None]
    agree = ((ratios - 1).abs() < 0.05).sum(1)
    group = (ratios[agree.argmax()] - 1).abs() < 0.05
    return float(copies[group].median())


def solve_system_and_scale(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch_size: int,
    *,
    nonnegative: bool = False,
    trust: float = 0.05,
    rounds: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[SystemCounts, float, bool]:
    """`solve_label_system` for gradients times an unknown factor.

    Returns:
        The counts, the factor, and whether it is certain: iLRG's answer at it explains the gradient, and at no other,
        or an example was solved.
    """
    slopes = [bias_gradient] if bias_gradient is not None else list(stand_in_slopes(weight_gradient, weight, 8))
    offset = torch.zeros_like(weight[:, 0]) if bias is None else bias
    answers = [restore_counts_and_scale(weight_gradient, s, weight, offset, batch_size) for s in slopes]
    first = min(answers, key=lambda answer: answer.mismatch)
    scale, certain = first.scale, first.identified and first.mismatch <= trust
    if not certain:
        space = head_space(weight_gradient, bias_gradient, weight, bias, batch_size)
        starts = torch.Generator().manual_seed(0) if generator is None else generator
        solved = example_scale(space, batch_size, starts, nonnegative=nonnegative)
        scale, certain = (scale, False) if solved is None else (solved, True)
    counts = solve_label_system(
        weight_gradient.double() / scale,
        None if bias_gradient is None else bias_gradient.double() / scale,
        weight,
        bias,
        batch_size,
        nonnegative=nonnegative,
        trust=trust,
        rounds=rounds,
        generator=generator,
    )
    return counts, scale, certain
