"""What the last layer's gradient tells about labels: iDLG's single label, iLRG's counts per class.

`C` classes, `m` features (what the last layer, the head, takes in), `B` examples. The head computes `z = W e + b`
from features `e`, and `p = softmax(z)`. Under a mean cross-entropy

    grad W_c = (1/B) sum_r (p_r[c] - [y_r = c]) e_r,    grad b_c = (1/B) sum_r (p_r[c] - [y_r = c]),

and all that follows stands on these two lines. In them features only ever stand in sums: wherever a function takes
`weight_gradient` `(C, m)`, its image `weight_gradient @ W.T` `(C, C)` under the head serves as well and gives the
image of the result. `restore_label_counts` works on that image, which it needs anyway. (The one thing that depends on
the space is how far `centred_class_embeddings` draws its centre to 0: it measures lengths where it works.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.errors import InputError

#: The authors' code cuts the embeddings' decimal exponents at 10, so that a vanishing `grad b_c` stays finite.
EMBEDDING_CAP = 1e10
#: Singular values of the system (pivots of its LU) that count as zero; its regular ones are near 1.
SINGULAR = 1e-5


def sparsified(weight_gradient: Tensor, share: float = 0.01) -> bool:
    """Whether more than a `share` of a head's weight gradient `(C, m)` was set to 0.

    A feature that is 0 for the whole batch gives a column of zeros; within any other no element is exactly 0.
    """
    zero = weight_gradient == 0
    alive = ~zero.all(0)
    return bool(zero[:, alive].sum() > share * zero.shape[0] * alive.sum())


# ---------------------------------------------------------------------- one example


def idlg_label(weight_gradient: Tensor | None = None, bias_gradient: Tensor | None = None) -> Tensor:
    """The label of a single example: shape `()`, int64 (Zhao, Mopuri & Bilen 2020).

    `weight_gradient`: `(C, m)`; `bias_gradient`: `(C,)`; one of them is enough, and the bias's is taken if both are
    there. `p - onehot(y)` is negative at the label and nowhere else. The bias's gradient is that vector. The weight's
    is that vector times the features, whose signs are unknown: the label's row is the one that points against all
    others. With two classes both rows do, and only the bias tells: raises `InputError`.
    """
    if bias_gradient is not None:
        return bias_gradient.argmin()
    if weight_gradient is None:
        raise InputError("Give the head's weight gradient or its bias gradient.")
    if len(weight_gradient) < 3:
        raise InputError(
            f"With {len(weight_gradient)} classes the weight's gradient alone does not tell the label: the rows are "
            "each other's negatives. Give the bias's gradient."
        )
    # Along the largest row, the vector p - onehot(y) up to its sign; the sign is right if most entries are positive.
    scores = weight_gradient @ weight_gradient[weight_gradient.norm(dim=1).argmax()]
    upright = (scores > 0).sum() >= (scores < 0).sum()
    return torch.where(upright, scores, -scores).argmin()


# ---------------------------------------------------------------------- a batch: features and probabilities per class


def class_embeddings(weight_gradient: Tensor, bias_gradient: Tensor) -> Tensor:
    """`e_c = grad W_c / grad b_c`, what stands for the features of class `c`'s examples (Ma et al. 2023).

    `weight_gradient`: `(C, m)` or its image under the head; `bias_gradient`: `(C,)`. Returns `(C, m)`.
    Exact if the class is absent and all examples are alike. Differs from the authors' code in: no rounding to seven
    digits, and 0 instead of `1e10 grad W_c` where `grad b_c` is 0.
    """
    known = bias_gradient.abs() > torch.finfo(bias_gradient.dtype).tiny
    inverse = torch.where(known, bias_gradient, torch.ones_like(bias_gradient)).reciprocal() * known
    return (weight_gradient * inverse[:, None]).clamp(-EMBEDDING_CAP, EMBEDDING_CAP)


def centred_class_embeddings(weight_gradient: Tensor, bias_gradient: Tensor, counts: Tensor, batch_size: int) -> Tensor:
    """Features per class that stay finite where `grad b_c` vanishes, given an estimate of the counts (ours).

    `weight_gradient`: `(C, m)` or its image under the head; `bias_gradient`: `(C,)`; `counts`: `(C,)`, real numbers
    (all zeros: every class gets the centre). Returns `(C, m)`.

    iLRG's quotient amplifies the distance of a class from the others by `n_c / (B grad b_c)`, without bound where a
    class has just as many examples as the model expects. With `a` the features' mean,

        grad W_c - grad b_c a = (1/B) [sum_r p_r[c] (e_r - a) - sum_{r: y_r = c} (e_r - a)],

    and the first sum nearly vanishes where `p[c]` varies little over the batch, so `e_c` is
    `a - (B / n_c) (grad W_c - grad b_c a)`: a quotient by the count. The same equation, read as a regression of
    `grad W_c` on `grad b_c` whose noise grows with `n_c`, gives `a`. Where every class comes as often as expected the
    regression has nothing to go by, and `a` is drawn to 0 by as much as noise alone would explain (James and Stein).
    """
    counts = counts.clamp_min(0)
    trust = 1 / (counts + 1)
    product = (trust * bias_gradient) @ weight_gradient
    square = trust @ bias_gradient.square()
    explained = product.square().sum() / square
    unexplained = (trust @ weight_gradient.square().sum(1) - explained) / (len(counts) - 1)
    tiny = torch.finfo(explained.dtype).tiny
    centre = product / square * (1 - unexplained / explained.clamp_min(tiny)).clamp(0, 1)
    present = counts > 0.5
    scale = torch.where(present, batch_size / counts.clamp_min(1), torch.zeros_like(counts))
    own = (bias_gradient[:, None] * centre - weight_gradient) * scale[:, None]
    return (centre + own).clamp(-EMBEDDING_CAP, EMBEDDING_CAP)


def class_probabilities(embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`p_j = softmax(W e_j + b)`: `(C, C)`, row `j` for the examples of class `j` (Ma et al. 2023).

    `embeddings`: `(C, m)`; `weight`: `(C, m)`; `bias`: `(C,)`.
    """
    return F.linear(embeddings, weight, bias).softmax(1)


# ---------------------------------------------------------------------- a batch: the counts


def label_system(probabilities: Tensor, bias_gradient: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The linear system of the counts `n` (Ma et al. 2023): coefficients `(C+1, C)` and values `(C+1,)`.

    First `sum_j n_j = B`, then for every class `i`: `sum_j n_j p_j[i] - n_i = B grad b_i`.
    """
    balance = probabilities.T - torch.eye(len(probabilities), dtype=probabilities.dtype, device=probabilities.device)
    coefficients = torch.cat([torch.ones_like(balance[:1]), balance])
    values = torch.cat([bias_gradient.new_full((1,), batch_size), batch_size * bias_gradient])
    return coefficients, values


def solve_label_counts(probabilities: Tensor, bias_gradient: Tensor, batch_size: int) -> Tensor:
    """The least-squares solution of `label_system`, real numbers that sum to `B`: shape `(C,)`.

    The columns of `P^T - I` sum to zero, so the balance equations live among the vectors of sum zero, and the first
    equation in what is left. With `s = 1 / sqrt(C)`, the square system

        (P^T - I + s 1 1^T) n = B (grad b - mean(grad b)) + s B

    therefore has the tall one's residual, but for a constant, and its solution; LU costs a small part of an SVD.
    Where probabilities are saturated at 0 and 1 the system is singular, and the solution of least norm is taken.
    Differs from the authors' code in: singular values count as zero from `SINGULAR` down (theirs: 1e-15 of the
    largest, which lets counts of 1e11 through).
    """
    classes = len(probabilities)
    share = classes**-0.5
    square = probabilities.T - torch.eye(classes, dtype=probabilities.dtype, device=probabilities.device) + share
    values = batch_size * (bias_gradient - bias_gradient.mean() + share)
    factors, pivots, _ = torch.linalg.lu_factor_ex(square)
    if factors.diagonal().abs().min() > SINGULAR:
        return torch.linalg.lu_solve(factors, pivots, values[:, None])[:, 0]
    # Iterated Tikhonov regularisation: from 0, three steps leave (SINGULAR / sigma)^6 of a singular value's part.
    normal = square.T @ square
    normal.diagonal().add_(SINGULAR**2)
    factor = torch.linalg.cholesky(normal)
    solution = torch.zeros_like(values)
    for _ in range(3):
        residual = square.T @ (values - square @ solution)
        solution = solution + torch.cholesky_solve(residual[:, None], factor)[:, 0]
    return solution


def round_counts(solution: Tensor, batch_size: int) -> Tensor:
    """The non-negative integers of sum `B` nearest to `solution` in Euclidean distance: shape `(C,)`, int64.

    Projects onto the non-negative vectors of sum `B` (all classes lowered alike, negative ones set to 0), then rounds
    down and gives what is missing to the largest remainders; ties go to the first classes. Differs from the authors'
    code in: that rounds each class by itself and reports counts of any sum.
    """
    limit = 1e6 * batch_size  # beyond it, integers would be lost to rounding
    x = torch.nan_to_num(solution.double(), nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)
    descending = x.sort(descending=True).values
    excess = (descending.cumsum(0) - batch_size) / torch.arange(1, len(x) + 1, device=x.device)
    # The projection lowers by the excess of as many leading classes as stay above it.
    lowered = (x - excess[(descending > excess).sum() - 1]).clamp_min(0)
    whole = lowered.floor()
    rank = (lowered - whole).argsort(descending=True, stable=True).argsort()
    return (whole + (rank < (batch_size - whole.sum()).round())).to(torch.int64)


def head_mismatch(
    counts: Tensor,
    embeddings: Tensor,
    probabilities: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    batch_size: int,
) -> Tensor:
    """How far a batch of `counts[c]` examples of features `embeddings[c]` is from the head's gradient: shape `()`.

    The norm of the difference of the gradients over weight and bias, relative to that of the sent one: 0 is a
    perfect explanation. `embeddings` and `weight_gradient`: `(C, m)`, or both their images under the head.
    """
    n = counts.to(probabilities.dtype)
    balance = (probabilities * n[:, None]).T - torch.diag(n)
    sent = torch.cat([weight_gradient, bias_gradient[:, None]], dim=1)
    own = torch.cat([balance @ embeddings, balance.sum(1, keepdim=True)], dim=1) / batch_size
    return torch.linalg.vector_norm(own - sent) / torch.linalg.vector_norm(sent)


@dataclass(frozen=True, kw_only=True)
class RestoredCounts:
    """What `restore_label_counts` found.

    `counts`: `(C,)` int64, sums to `B`; `solution`: `(C,)`, before rounding; `probabilities`: `(C, C)`, row `j` for
    class `j`; `mismatch`: see `head_mismatch`; `refinement`: which answer was kept, 0 for the paper's. `scale`: the
    factor of the gradient, found where it was unknown; `identified`: whether no other factor explains it as well.
    """

    counts: Tensor
    solution: Tensor
    probabilities: Tensor
    mismatch: float
    refinement: int
    scale: float = 1.0
    identified: bool = True


def restore_label_counts(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    weight: Tensor,
    bias: Tensor,
    batch_size: int,
    *,
    refinements: int = 2,
) -> RestoredCounts:
    """How many examples of each class stand in a batch, from the gradient of its last layer. Computes in float64.

    `weight_gradient`, `weight`: `(C, m)`; `bias_gradient`, `bias`: `(C,)`; `batch_size`: `B`.
    `refinements`: 0 is iLRG as published (class-wise embeddings, their probabilities, the system's least-squares
    solution, rounded). More add as many answers from `centred_class_embeddings`, each from the last one's counts, the
    first from the counts if all examples were alike; of all answers the one that explains the head's gradient best is
    kept.
    """
    gradient, slopes, weight, bias = (t.detach().double() for t in (weight_gradient, bias_gradient, weight, bias))
    image = gradient @ weight.T
    answers: list[tuple[Tensor, Tensor, Tensor]] = []
    mismatches = []
    for refinement in range(refinements + 1):
        if refinement == 0:
            embeddings = class_embeddings(image, slopes)
        elif refinement == 1:
            centre = centred_class_embeddings(image, slopes, torch.zeros_like(slopes), batch_size)[0]
            alike = batch_size * ((centre + bias).softmax(0) - slopes + slopes.mean())  # B grad b = B p - n
            embeddings = centred_class_embeddings(image, slopes, alike, batch_size)
        else:
            embeddings = centred_class_embeddings(image, slopes, answers[-1][1], batch_size)
        probabilities = (embeddings + bias).softmax(1)
        solution = solve_label_counts(probabilities, slopes, batch_size)
        counts = round_counts(solution, batch_size)
        answers.append((counts, solution, probabilities))
        mismatches.append(head_mismatch(counts, embeddings, probabilities, image, slopes, batch_size))
    errors = torch.nan_to_num(torch.stack(mismatches), nan=torch.inf)
    best = int(errors.argmin())
    counts, solution, probabilities = answers[best]
    return RestoredCounts(
        counts=counts,
        solution=solution,
        probabilities=probabilities,
        mismatch=float(errors[best]),
        refinement=best,
    )


def update_label_counts(
    initial: tuple[Tensor, Tensor],
    final: tuple[Tensor, Tensor],
    learning_rate: float,
    steps: int,
    batch_size: int,
    *,
    refinements: int = 2,
) -> RestoredCounts:
    """Counts over all local steps of a FedAvg client: `counts` sum to `steps * batch_size`.

    `initial`, `final`: the head's weight `(C, m)` and bias `(C,)` before and after `steps` of plain SGD. The update
    over `learning_rate * steps` is the mean gradient along the path, taken as that of one batch of `T B` examples at
    the mean of initial and final head (ours; exact to first order in the learning rate).
    """
    if not learning_rate > 0 or steps < 1:
        raise InputError(
            f"`learning_rate` and `steps` must be positive, got {learning_rate} and {steps}: give the client's own."
        )
    before, after = ([t.detach().double() for t in pair] for pair in (initial, final))
    weight_gradient, bias_gradient = ((b - a) / (learning_rate * steps) for b, a in zip(before, after, strict=True))
    weight, bias = ((b + a) / 2 for b, a in zip(before, after, strict=True))
    return restore_label_counts(
        weight_gradient, bias_gradient, weight, bias, steps * batch_size, refinements=refinements
    )


def labels_of(counts: Tensor) -> Tensor:
    """Each class as often as `counts` `(C,)` says, in ascending order: shape `(B,)`, int64."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
