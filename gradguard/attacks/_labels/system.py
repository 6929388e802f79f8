"""Labels of trained models: the head's gradient as a system of equations, solved class by class and example by example.

With `d_r = p_r - onehot(y_r)` and `e_r` the features of example `r` (followed by a 1 where the bias's gradient is
there), the head's gradient is `G = (1/B) sum_r d_r e_r^T`, and `z_r = A e_r` are the scores, `A` the head's weight and
bias. A batch smaller than the number of classes leaves `G` with rank `r <= B`: its column space holds every `d_r`, its
row space every `e_r`. Three facts follow that no training takes away.

- `d_r` has one negative entry, the label's, and the column space is small: a class for which it holds no such vector is
  absent. One linear program per class tells (Dang et al. 2021, "Revealing and Protecting Labels in Distributed
  Training", ask it as separability by a hyperplane).
- An example solves, alone, "the `d` that its `e` gives lies in the column space": `r` unknowns, `C - 1 - r` equations,
  and one more for each feature that a ReLU has set to 0.
- Of a solution, `u = e^T G^+ d / B` is 1, or `1/k` if `k` of the batch are copies of it (Wedderburn's rank reduction).
  So solutions check themselves, and subtracting them leaves the gradient of the rest, of lower rank: an easier one.

What is said about examples, classes and counts here is ours but for the linear program.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.attacks._labels.counts import RestoredCounts, restore_label_counts, round_counts
from gradguard.attacks._labels.space import LARGEST_RANK, HeadSpace, head_space, possible_classes

#: Share of the gradient that iLRG's answer may leave unexplained before an even spread is the better guess.
USELESS = 0.5
#: Noise relative to the weakest direction of the gradient from which the linear programs exclude no class.
NOISY = 0.1
#: Elements of the normal equations of one Levenberg-Marquardt step, over all its problems.
LARGEST_STEP = 1.5e8


# ---------------------------------------------------------------------- which examples: one problem each


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Solutions of `T` single-example problems.

    `labels`: `(T,)`; `features`: `(T, r)`, coordinates of `e` in the row space; `directions`: `(T, r)`, of `d / |d_y|`
    in the column space; `residuals`: `(T,)`, what of it lies outside; `copies`: `(T,)`, how many examples of the batch
    each stands for; `equations`: `(T,)`, how many equations hold it in place, for `r` unknowns.
    """

    labels: Tensor
    features: Tensor
    directions: Tensor
    residuals: Tensor
    copies: Tensor
    equations: Tensor


def single_examples(
    space: HeadSpace, labels: Tensor, start: Tensor, batch_size: int, *, nonnegative: bool = False, iterations: int = 50
) -> Examples:
    """Levenberg-Marquardt on `T` single-example problems at once.

    `labels`: `(T,)`; `start`: `(T, r)`, coordinates of `e`. Whatever the label's own probability, `d / |d_y|` is -1 at
    the label and the softmax of the other scores elsewhere; minimised is what of it lies outside the column space, with
    the distance of the appended entry from 1 and, for `nonnegative` features, their negative parts (relative to the
    features' size).
    """
    classes, rank = space.scores.shape
    own = F.one_hot(labels, classes).to(start.dtype)
    eye = torch.eye(rank, dtype=start.dtype, device=start.device)
    plain = space.right if space.one is None else space.right[:-1]

    def at(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        scores = (a @ space.scores.T + space.offset).masked_fill(own.bool(), -torch.inf)
        others = scores.softmax(1)
        direction = others - own
        outside = direction - (direction @ space.left) @ space.left.T
        one = a @ space.one - 1 if space.one is not None else torch.zeros_like(a[:, 0])
        value = outside.square().sum(1) + one.square()
        below, scale = torch.zeros_like(a[:, :0]), torch.ones_like(one)
        if nonnegative:
            features = a @ plain.T
            # A weight of 1 on the root mean square would drown the other equations.
            scale = 0.5 / features.square().mean(1).sqrt().clamp_min(1e-9)
            below = features.clamp_max(0) * scale[:, None]
            value = value + below.square().sum(1)
        return others, outside, one, below, scale, value

    a, state = start, at(start)
    damping = torch.full_like(start[:, 0], 1e-2)
    for _ in range(iterations):
        others, outside, one, below, scale, value = state
        slopes = others[:, :, None] * (space.scores - (others @ space.scores)[:, None, :])
        inside = space.left.T @ slopes
        normal = slopes.mT @ slopes - inside.mT @ inside
        gradient = (outside[:, None, :] @ slopes)[:, 0]
        if space.one is not None:
            normal = normal + torch.outer(space.one, space.one)
            gradient = gradient + one[:, None] * space.one
        if nonnegative:
            active = (below < 0) * scale[:, None]
            normal = normal + plain.T @ (active.square()[:, :, None] * plain)
            gradient = gradient + (below * active) @ plain
        size = normal.diagonal(dim1=1, dim2=2)
        size = size + 1e-3 * size.mean(1, keepdim=True) + 1e-12
        step, _ = torch.linalg.solve_ex(normal + (damping[:, None] * size)[:, :, None] * eye, gradient)
        trial = at(a - step)
        better = trial[-1] < value
        a = torch.where(better[:, None], a - step, a)
        state = tuple(  # type: ignore[assignment]
            torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(trial, state, strict=True)
        )
        damping = torch.where(better, damping / 4, damping * 4).clamp(1e-12, 1e8)
    others, *_, value = state
    directions = (others - own) @ space.left
    scores = a @ space.scores.T + space.offset
    mine = scores.gather(1, labels[:, None])[:, 0]
    miss = torch.sigmoid(scores.masked_fill(own.bool(), -torch.inf).logsumexp(1) - mine)  # 1 - p_y
    weight = 1 / ((a / space.strengths) * directions).sum(1)
    equations = torch.full_like(labels, classes - 1 - rank + (space.one is not None))
    if nonnegative:
        features = a @ plain.T
        equations = equations + (features < 1e-3 * features.abs().amax(1, keepdim=True)).sum(1)
    return Examples(
        labels=labels,
        features=a,
        directions=directions,
        residuals=value.sqrt(),
        copies=batch_size * weight / miss,
        equations=equations,
    )


def example_starts(
    space: HeadSpace, classes: Tensor, spreads: tuple[float, ...], noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels `(T,)` and coordinates `(T, r)` to start from: each class's own row of `-G`, which its examples dominate.

    `spreads`: standard deviations of the scores that the rows are scaled to; `noise`: of the random part.
    """
    rows = -(space.left * space.strengths)[classes]
    draw = torch.randn(len(spreads), *rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    rows = rows + noise * rows.norm(dim=1, keepdim=True) * draw / space.rank**0.5
    spread = (rows @ space.scores.T).std(2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    wanted = torch.tensor(spreads, dtype=rows.dtype, device=rows.device)[:, None, None]
    return classes.repeat(len(spreads)), (rows / spread * wanted).flatten(0, 1)


def accepted(found: Examples, space: HeadSpace, batch_size: int) -> Tensor:
    """Which solutions are examples, one of each: indices.

    Within the column space to a thousandth, held in place by more equations than unknowns, standing for a whole number
    of copies, and compatible: `e_i^T G^+ d_j = 0` between any two examples.
    """
    copies = found.copies
    sure = (found.residuals < 1e-3) & (found.equations >= space.rank + 2)
    sure &= (copies > 0.5) & (copies < batch_size + 0.5) & ((copies - copies.round()).abs() < 0.05 * copies.round())
    order = torch.nonzero(sure)[:, 0]
    order = order[found.residuals[order].argsort()]
    pairs = (found.features[order] / space.strengths) @ found.directions[order].T
    scale = pairs.diagonal()
    conflict = ((pairs * pairs.T / torch.outer(scale, scale)).abs() > 0.05).tolist()
    kept: list[int] = []
    for i in range(len(order)):
        if not any(conflict[i][j] for j in kept):
            kept.append(i)
    return order[kept[: space.rank]]


# ---------------------------------------------------------------------- all of it


@dataclass(frozen=True, kw_only=True)
class PartialCounts:
    """What is certain about a batch, and what is left of its gradient.

    `examples`: `(C,)` int64, examples that were found one by one; `classes`: `(C,)` bool, classes that must be there
    beside, or `None` if the rest does not tell; `rest`: the space of the examples that were not found.
    """

    examples: Tensor
    classes: Tensor | None
    rest: HeadSpace


def explain(
    space: HeadSpace, batch_size: int, generator: torch.Generator, *, nonnegative: bool = False, rounds: int = 8
) -> PartialCounts:
    """Tell possible classes, look for their examples, subtract those found, and go on with the rest.

    Ends after `rounds`, two of them without a find, or when nothing is left. A rank above `LARGEST_RANK` is not
    touched, nor one that fills the `C - 1` dimensions there are.
    """
    counts = torch.zeros(len(space.scores), dtype=torch.int64, device=space.left.device)
    possible: Tensor | None = None
    fruitless = 0
    for turn in range(rounds):
        classes, room = len(counts), batch_size - int(counts.sum())
        if not 0 < space.rank < classes - 1 or space.rank > LARGEST_RANK or room == 0:
            break
        if possible is None:
            possible = possible_classes(space)
        candidates = torch.nonzero(possible)[:, 0]
        rows = classes + (space.right.shape[0] if nonnegative else 0)
        most = int(LARGEST_STEP / (rows * space.rank**2) / max(len(candidates), 1))
        determined = nonnegative or classes - space.rank >= space.rank + 2
        if len(candidates) == 0 or most == 0 or not determined:
            break
        spreads = ((2.0, 6.0) if turn == 0 else (1.0, 2.0, 3.0, 4.0, 6.0, 10.0) * 4)[:most]
        starts = example_starts(space, candidates, spreads, 0.0 if turn == 0 else 0.7, generator)
        found = single_examples(space, *starts, batch_size, nonnegative=nonnegative)
        kept = accepted(found, space, room)
        copies = found.copies[kept].round().long()
        kept, copies = kept[copies.cumsum(0) <= room], copies[copies.cumsum(0) <= room]
        if len(kept) == 0:
            fruitless += 1
            if fruitless == 2:
                break
            continue
        counts = counts.index_add(0, found.labels[kept], copies)
        space, possible = space.without(found.directions[kept], found.features[kept]), None
    room = batch_size - int(counts.sum())
    if possible is None and 0 < space.rank < len(counts) - 1 and space.rank <= LARGEST_RANK:
        possible = possible_classes(space)
    # More classes than examples: the column space leaves too much open.
    if possible is not None and not 0 < int(possible.sum()) <= room:
        possible = None
    return PartialCounts(examples=counts, classes=possible, rest=space)


@dataclass(frozen=True, kw_only=True)
class SystemCounts:
    """What `solve_label_system` found.

    `counts`: `(C,)` int64, sums to `B`; `examples`: how many of the labels belong to an example that was solved;
    `classes`: how many more to a class that is told to be there; `guessed`: the others; `mismatch`: what iLRG's answer
    leaves unexplained of the gradient (`head_mismatch`).
    """

    counts: Tensor
    examples: int
    classes: int
    guessed: int
    mismatch: float


def solve_label_system(
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
) -> SystemCounts:
    """How many examples of each class stand in a batch, on trained models too and with or without a bias in the head.

    `weight_gradient`, `weight`: `(C, m)`; `bias_gradient`, `bias`: `(C,)` or `None`; `nonnegative`: the features are.
    iLRG's answer is kept where it leaves at most `trust` of the head's gradient unexplained. Else examples are solved
    one by one (`explain`, `rounds`), each class that the rest of the gradient calls for counts once, and iLRG's answer
    on the rest shares out what is then left. `generator`: of the starts (default: seed 0).
    """
    first = _class_wise(weight_gradient, bias_gradient, weight, bias, batch_size)
    if first.mismatch <= trust:
        return SystemCounts(counts=first.counts, examples=0, classes=0, guessed=batch_size, mismatch=first.mismatch)
    space = head_space(weight_gradient, bias_gradient, weight, bias, batch_size)
    generator = generator or torch.Generator().manual_seed(0)
    found = explain(space, batch_size, generator, nonnegative=nonnegative, rounds=rounds)
    left = batch_size - int(found.examples.sum())
    if left == batch_size and found.classes is None:
        return SystemCounts(counts=first.counts, examples=0, classes=0, guessed=batch_size, mismatch=first.mismatch)
    sure = torch.zeros_like(found.examples) if found.classes is None else found.classes.long()
    guessed = left - int(sure.sum())
    counts = found.examples + sure
    if guessed:
        counts = counts + _share(found, first, weight, bias, batch_size, left, guessed, bias_gradient is not None)
    return SystemCounts(
        counts=counts,
        examples=batch_size - left,
        classes=int(sure.sum()),
        guessed=guessed,
        mismatch=first.mismatch,
    )


def _share(
    found: PartialCounts,
    first: RestoredCounts,
    weight: Tensor,
    bias: Tensor | None,
    batch_size: int,
    left: int,
    guessed: int,
    with_bias: bool,
) -> Tensor:
    """The `guessed` labels that nothing is certain about, `(C,)`: those that iLRG finds in the rest and more."""
    answer: RestoredCounts | None = first
    if found.rest.rank == 0:
        answer = None  # examples without a gradient
    elif left < batch_size:
        rest = found.rest.matrix * (batch_size / left)
        slopes = rest[:, -1] if with_bias else None
        answer = _class_wise(rest[:, : weight.shape[1]], slopes, weight, bias, left)
    if answer is None or (answer.mismatch > USELESS and found.rest.rank < batch_size):
        solution = torch.full_like(first.solution, left / len(first.solution))
    else:
        solution = answer.solution
    if found.classes is not None:
        # Other classes are out of the question only where noise has not bent the column space.
        clean = found.rest.noise < NOISY * found.rest.strengths[-1]
        solution = solution.clamp(-left, left)
        solution = torch.where(found.classes, solution - 1, torch.where(clean, -2.0 * left, solution))
    return round_counts(solution, guessed)


def _class_wise(
    weight_gradient: Tensor, bias_gradient: Tensor | None, weight: Tensor, bias: Tensor | None, batch_size: int
) -> RestoredCounts:
    """iLRG's answer; without a bias's gradient, the best of those for the slopes that stand in for it."""
    offset = torch.zeros_like(weight[:, 0]) if bias is None else bias
    if bias_gradient is not None:
        return restore_label_counts(weight_gradient, bias_gradient, weight, offset, batch_size)
    trials = [
        restore_label_counts(weight_gradient, slopes, weight, offset, batch_size)
        for slopes in stand_in_slopes(weight_gradient, weight)
    ]
    return min(trials, key=lambda found: found.mismatch)


def stand_in_slopes(weight_gradient: Tensor, weight: Tensor, steps: int = 24) -> Tensor:
    """What the bias's gradient would be if all features were `s a`: `(2 steps, C)`, for scales `s` of both signs.

    `a`: the row space's leading direction. `grad W a = s grad b` then; `s` from spreads of the scores of 0.01 to 10.
    """
    gradient, head = weight_gradient.detach().double(), weight.detach().double()
    *_, right = torch.linalg.svd(gradient - gradient.mean(0), full_matrices=False)
    scales = torch.logspace(-2, 1, steps, dtype=head.dtype, device=head.device) / (head @ right[0]).std()
    return (gradient @ right[0]) / torch.cat([scales, -scales])[:, None]
