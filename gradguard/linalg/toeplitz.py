"""Lower-triangular Toeplitz matrices `C`, by their first column: noise that is correlated over rounds.

Messages of `n` rounds, rows of `G`, are sent as `G + C^{-1} Z`, `Z ~ N(0, sigma^2 I)`: since
`C (G + C^{-1} Z) = C G + Z` that is one Gaussian mechanism of multiplier `sigma / sens(C)` for all rounds together.
What the model accumulates (prefix sums) has the error `sigma^2 |(A C^{-1})_t|^2`, `A = tril(1)`. All in float64.
Sources: Choquette-Choo et al. 2023, arXiv 2306.08153; Pillutla et al. 2025, arXiv 2506.08201, chapter 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.signal import lfilter

from gradguard.errors import InputError

Column = NDArray[Any]


def square_root(rounds: int) -> Column:
    """`C` with `C C = A`: 1, 1/2, 3/8, 5/16, ... (Fichtenberger et al. 2022, arXiv 2202.11205).

    Args:
        rounds: Entries, at least 1.

    Returns:
        Shape `(rounds,)`.
    """
    return _power(-1, rounds)


def inverse_square_root(bands: int) -> Column:
    """The first coefficients of `(1 - z)^{1/2}`: 1, -1/2, -1/8, -1/16, ... (Kalinin et al. 2025, arXiv 2505.12128).

    Args:
        bands: Entries, at least 1.

    Returns:
        Shape `(bands,)`.
    """
    return _power(1, bands)


def _power(halves: int, count: int) -> Column:
    """The first coefficients of `(1 - z)^(halves / 2)`."""
    k = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * k - 2 - halves) / (2 * k))])


def buffered(theta: Sequence[float] | Column, omega: Sequence[float] | Column, rounds: int) -> Column:
    """`c_0 = 1`, `c_i = sum_j omega_j theta_j^{i-1}`: a buffered linear Toeplitz matrix (arXiv 2404.16706).

    Args:
        theta: Decay of each buffer, in (0, 1).
        omega: Its weight.
        rounds: Entries, at least 1.

    Returns:
        Shape `(rounds,)`.
    """
    power = np.arange(rounds - 1)[:, None]
    tail = (np.asarray(omega, float) * np.asarray(theta, float) ** power).sum(1)
    return np.concatenate([[1.0], tail])


def inverse(column: Sequence[float] | Column, rounds: int) -> Column:
    """The first column of `C^{-1}`.

    Args:
        column: Of `C`; entries that are not there are 0. The first must not be 0.
        rounds: Entries of the result, at least 1.

    Returns:
        Shape `(rounds,)`.

    Raises:
        InputError: If the first entry is 0.
    """
    c = np.asarray(column, float)
    if c[0] == 0:
        raise InputError("A Toeplitz matrix whose first entry is 0 has no inverse.")
    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    return lfilter([1.0], c[:rounds], impulse)


def prefix_errors(column: Sequence[float] | Column, rounds: int) -> Column:
    """`|(A C^{-1})_t|^2`: the variance of the noise in the sum of the first `t + 1` messages, for `sigma = 1`.

    Args:
        column: Of `C`.
        rounds: `n`.

    Returns:
        Shape `(rounds,)`.
    """
    return np.cumsum(np.cumsum(inverse(column, rounds)) ** 2)


def most_participations(rounds: int, separation: int, participations: int | None = None) -> int:
    """How often one example can take part: every `separation` rounds at most.

    Args:
        rounds: `n`.
        separation: Rounds from one use to the next, at least 1.
        participations: A bound of the user's own.

    Returns:
        At least 1.

    Raises:
        InputError: If a number is below 1.
    """
    for name, value in (("rounds", rounds), ("separation", separation), ("participations", participations or 1)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")
    most = -(-rounds // separation)
    return most if participations is None else min(most, participations)


def sensitivity(
    column: Sequence[float] | Column, rounds: int, *, separation: int = 1, participations: int | None = 1
) -> float:
    """By how much one example can change `C G`, where it changes each message by at most 1: an upper bound.

    For `c >= 0` and nonincreasing it is exact: the uses at rounds 0, b, 2b, ... (Kalinin and Lampert 2024, arXiv
    2405.13763, Theorem 2). For any other `c` that formula is too small; here `c` is replaced by the nonincreasing
    majorant of its absolute values first.

    Args:
        column: Of `C`.
        rounds: `n`.
        separation: Rounds from one use to the next at least, `b`.
        participations: Uses at most, `k`; `None`: as many as fit.

    Returns:
        Positive.

    Raises:
        InputError: If a number is below 1.
    """
    count = most_participations(rounds, separation, participations)
    c = np.abs(np.asarray(column, float))[:rounds]
    c = np.pad(c, (0, rounds - len(c)))
    majorant = np.maximum.accumulate(c[::-1])[::-1]
    total = np.zeros(rounds)
    for use in range(count):
        total[use * separation :] += majorant[: rounds - use * separation]
    return float(np.linalg.norm(total))


def optimised_bands(rounds: int, bands: int) -> tuple[Column, float]:
    """The banded `C` of least mean prefix error times `|c|^2`, for uses at least `bands` rounds apart.

    L-BFGS with the gradient in closed form: with `x = c^{-1}` (a power series), `s` its prefix sums and
    `w_t = (n - t) / n` the error is `sum w s^2`, its derivative by `x` the reversed prefix sums of `2 w s`, and by
    `c_j` minus the product of that, from `j` on, with `x * x` (Choquette-Choo et al. 2023, arXiv 2306.08153;
    Kalinin and Lampert 2024, arXiv 2405.13763).

    Args:
        rounds: `n`.
        bands: Entries of `c` that are not 0, from 1 to `n`.

    Returns:
        The first `bands` entries, `|c| = 1`, and the loss.

    Raises:
        InputError: If `bands` is outside its range.
    """
    if not 1 <= bands <= rounds:
        raise InputError(f"`bands` must be from 1 to `rounds` = {rounds}, got {bands}.")
    weights = (rounds - np.arange(rounds)) / rounds

    def loss(c: Column) -> tuple[float, Column]:
        x = inverse(c, rounds)
        sums = np.cumsum(x)
        error, square = float((weights * sums**2).sum()), float(c @ c)
        by_x = np.cumsum((2 * weights * sums)[::-1])[::-1]
        squared = np.convolve(x, x)[:rounds]
        by_c = -np.array([by_x[j:] @ squared[: rounds - j] for j in range(bands)])
        return error * square, by_c * square + 2 * error * c

    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12}
    found = minimize(loss, square_root(bands), jac=True, method="L-BFGS-B", options=options)
    return found.x / np.linalg.norm(found.x), float(found.fun)


def buffer_weights(theta: Sequence[float] | Column, poles: Sequence[float] | Column) -> Column:
    """`omega` of the buffers whose `C` has decays `theta` and whose `C^{-1}` has decays `poles` (arXiv 2504.21413).

    Args:
        theta: Of `C`, different from one another.
        poles: Of `C^{-1}`, as many.

    Returns:
        `omega_i = prod_j (theta_i - pole_j) / prod_{j != i} (theta_i - theta_j)`.
    """
    theta, poles = np.asarray(theta, float), np.asarray(poles, float)
    gaps = theta[:, None] - theta[None, :]
    np.fill_diagonal(gaps, 1.0)
    return (theta[:, None] - poles[None, :]).prod(1) / gaps.prod(1)


def optimised_buffers(
    rounds: int, *, separation: int = 1, participations: int | None = 1, error: str = "mean"
) -> tuple[Column, Column]:
    """Two buffers of least error times sensitivity (McMahan et al. 2024, arXiv 2404.16706 and 2408.08868).

    The decays `1 > theta_1 > pole_1 > theta_2 > pole_2 > 0` are found by L-BFGS from two starts, then Nelder and Mead's
    method, in coordinates that keep them in order; the loss is smooth and has four unknowns.

    Args:
        rounds: `n`.
        separation: As in `sensitivity`.
        participations: The same.
        error: "mean" or "max" over the rounds' prefix errors.

    Returns:
        `theta` and `omega`, shape `(2,)` each.

    Raises:
        InputError: If `error` is neither.
    """
    if error not in ("mean", "max"):
        raise InputError(f'`error` must be "mean" or "max", got {error!r}.')

    def decays(v: Column) -> tuple[Column, Column]:
        # 1 - theta_1 < 1 - pole_1 < ...: each is the one before plus a share of what is left.
        left = np.cumprod(1 / (1 + np.exp(v)))[[0, 1, 2, 3]]
        return left[[0, 2]], left[[1, 3]]

    def loss(v: Column) -> float:
        theta, poles = decays(v)
        omega = buffer_weights(theta, poles)
        if not np.isfinite(omega).all() or (omega <= 0).any():
            return math.inf
        column = buffered(theta, omega, rounds)
        errors = prefix_errors(column, rounds)
        size = float(errors.mean() if error == "mean" else errors.max())
        return math.log(size) + 2 * math.log(
            sensitivity(column, rounds, separation=separation, participations=participations)
        )

    starts = [np.array([-math.log(rounds / part + 2), -2.0, -0.5, -1.0]) for part in (2, 10)]
    rough = [minimize(loss, start, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-8}) for start in starts]
    best = min(rough, key=lambda found: found.fun)
    # Differences quotients end at 1e-8 or so; a simplex goes to the end of the precision.
    options = {"maxfev": 4000, "xatol": 1e-9, "fatol": 1e-15, "initial_simplex": best.x + _simplex(4, 1e-3)}
    best = minimize(loss, best.x, method="Nelder-Mead", options=options)
    theta, poles = decays(best.x)
    return theta, buffer_weights(theta, poles)


def _simplex(size: int, step: float) -> Column:
    """The corners of a small simplex around 0: `(size + 1, size)`."""
    return np.vstack([np.zeros(size), step * np.eye(size)])


def attacker_std(column: Sequence[float] | Column, rounds: int, uses: Sequence[int]) -> float:
    """The noise that an attacker who knows all other rounds faces in each use of one example, as if independent.

    `sqrt(k) / |C u|` with `u` the indicator of the `k` uses, white noise of standard deviation 1.

    Args:
        column: Of `C`.
        rounds: `n`.
        uses: Rounds in which the example takes part, from 0.

    Returns:
        Positive.
    """
    indicator = np.zeros(rounds)
    indicator[list(uses)] = 1.0
    seen = lfilter(np.asarray(column, float)[:rounds], [1.0], indicator)
    return float(math.sqrt(len(list(uses))) / np.linalg.norm(seen))
