"""Floors under the error of an attacker who sees a stream: noise correlated over rounds, an example used several times.

With `n = std C^{-1} w` an attacker who knows all other gradients faces
`F = std^-2 sum_{s,t in pi} (C^T C)_st J_s J_t^T`: the Jacobian of every use counts, not that of one checkpoint. One who
knows the other rounds' gradients up to a spread `tau` faces `S_rr + tau^2 I` for `S_rr`, `S = (C^T C)^{-1}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.leakage.floors import Floor, Prior, exact_floor
from gradguard.linalg.operator import safe_inverse

Matrix = NDArray[np.float64]


def stream_precision(
    column: ArrayLike,
    rounds: int,
    used: Sequence[int],
    *,
    spread: float = 0.0,
    learning_rates: Sequence[float] | None = None,
) -> Matrix:
    """What the noise of the rounds `used` looks like to an attacker: its inverse covariance, white noise having 1.

    Args:
        column: of `C`.
        rounds: that the attacker sees.
        used: rounds of the example, different ones.
        spread: `tau`, of what the attacker does not know of each other round, in units of the white noise. 0: others
            known, the worst case, `(C^T C)` at `used`; infinite: only the messages `used` are of any help.
        learning_rates: where the stream cancels `eta_t n_t`, one for each round.

    Returns:
        Shape `(U, U)`.

    Raises:
        InputError: if an option is out of its range.
    """
    used = list(used)
    if not used or len(set(used)) != len(used) or min(used) < 0 or max(used) >= rounds:
        raise InputError(f"`used` must be different rounds in [0, {rounds}), got {used}.")
    if not spread >= 0:
        raise InputError(f"`spread` must not be negative, got {spread}.")
    c = np.zeros(rounds)
    given = np.asarray(column, float)[:rounds]
    c[: len(given)] = given
    lag = np.subtract.outer(np.arange(rounds), np.arange(rounds))
    matrix = np.where(lag >= 0, c[np.maximum(lag, 0)], 0.0)
    if learning_rates is not None:
        if len(learning_rates) != rounds or min(learning_rates) <= 0:
            raise InputError(f"`learning_rates` must be {rounds} positive numbers.")
        rates = np.asarray(learning_rates, float)
        matrix = matrix * rates[None] / rates[:, None]
    gram = matrix.T @ matrix
    if spread == 0:
        return gram[np.ix_(used, used)]
    inverse = np.linalg.solve(matrix, np.eye(rounds))
    covariance = inverse @ inverse.T
    own = covariance[np.ix_(used, used)]
    others = [t for t in range(rounds) if t not in set(used)]
    if others and math.isfinite(spread):
        cross = covariance[np.ix_(used, others)]
        rest = covariance[np.ix_(others, others)] + spread**2 * np.eye(len(others))
        own = own - cross @ np.linalg.solve(rest, cross.T)
    return np.asarray(np.linalg.inv((own + own.T) / 2), dtype=np.float64)


def effective_std(column: ArrayLike, rounds: int, round: int, *, spread: float = 0.0) -> float:
    """The noise of one round that is left to an attacker, white noise having 1.

    Args:
        column: of `C`.
        rounds: that the attacker sees.
        round: of the message.
        spread: as in `stream_precision`: 0 is the worst case, infinite the single message.

    Returns:
        `sqrt(S_tt - S_tr (S_rr + tau^2 I)^{-1} S_rt)`.
    """
    return float(stream_precision(column, rounds, [round], spread=spread)[0, 0] ** -0.5)


def stream_floor(
    jacobians: Sequence[InputJacobian],
    column: ArrayLike,
    std: float,
    used: Sequence[int],
    *,
    rounds: int | None = None,
    prior: Prior | None = None,
    spread: float = 0.0,
    learning_rates: Sequence[float] | None = None,
) -> Floor:
    """The least mean squared error of an attacker who sees the whole stream, from dense Jacobians in float64.

    Args:
        jacobians: of the same inputs, one at each use: at that round's weights.
        column: of `C`.
        std: of the white noise, gradient units, positive (`Knowledge.filter.std`).
        used: the rounds of the uses.
        rounds: that the attacker sees; default: as many as the column has.
        prior: what inputs look like: the Bayes floor; `None`: Cramer-Rao, of the directions that are seen at all.
        spread: `tau` of the other rounds, see `stream_precision`. Report 0 (the worst case) and `math.inf` (these
            messages alone) side by side.
        learning_rates: as in `stream_precision`.

    Returns:
        The floor, one for each of the `R` problems.

    Raises:
        InputError: if the Jacobians do not fit the uses, or an option is out of its range.
    """
    if len(jacobians) != len(used) or not jacobians:
        raise InputError(f"Give one Jacobian for each use, at its round's weights: {len(jacobians)} for {len(used)}.")
    if not 0 < std < math.inf:
        raise InputError(f"`std` must be positive and finite, got {std}.")
    if len({(j.num_problems, j.size) for j in jacobians}) != 1:
        raise InputError("The Jacobians must be of the same inputs.")
    n = len(np.asarray(column)) if rounds is None else rounds
    weights = stream_precision(column, n, used, spread=spread, learning_rates=learning_rates) / std**2
    exact = [j.in_dtype(torch.float64) for j in jacobians]
    information = _information([j.dense() for j in exact], weights)
    size = exact[0].size
    if prior is None:
        mse, undetermined = _unbiased(information, size)
        return exact_floor(mse, undetermined=undetermined)
    root = _prior_root(prior, exact[0])
    between = root @ information @ root.mT
    values, vectors = torch.linalg.eigh((between + between.mT) / 2)
    left = vectors / (1 + values.clamp_min(0))[:, None] @ vectors.mT
    mse = torch.einsum("ij,rjk,ik->r", root, left, root) / size
    return exact_floor(mse, prior_mse=(root.square().sum() / size).expand(len(mse)))


def _information(dense: list[Tensor], weights: Matrix) -> Tensor:
    """`sum_st w_st J_s J_t^T` as a square, so that it is never indefinite: `(R, n, n)`."""
    factor = np.linalg.cholesky(weights)
    total = torch.zeros((), dtype=torch.float64, device=dense[0].device)
    for row in factor.T:
        part = sum((float(a) * j for a, j in zip(row[1:], dense[1:], strict=True)), float(row[0]) * dense[0])
        total = total + part @ part.mT
    return total


def _unbiased(information: Tensor, size: int) -> tuple[Tensor, Tensor]:
    values = torch.linalg.eigvalsh(information)
    seen = values > size * torch.finfo(values.dtype).eps * values[:, -1:]
    return safe_inverse(values * seen).sum(-1) / size, size - seen.sum(-1)


def _prior_root(prior: Prior, jacobian: InputJacobian) -> Tensor:
    shape = jacobian.inputs.shape[1:]
    size = shape.numel()
    identity = torch.eye(size, dtype=torch.float64, device=jacobian.inputs.device)
    one = prior.sqrt(identity.reshape(-1, *shape)).reshape(size, size)
    return torch.block_diag(*[one] * (jacobian.size // size))
