"""Noise over rounds: columns, errors and sensitivities against written-down values, and against dense matrices."""

import math

import numpy as np
import pytest

from gradguard.errors import InputError
from gradguard.linalg import toeplitz

#: Values that jax-privacy 2 and an independent reference agree on.
CLOSE = {"rel": 1e-6}


def dense(column, rounds):
    c = np.pad(np.asarray(column, float), (0, max(0, rounds - len(column))))
    return sum(np.diag(np.full(rounds - j, c[j]), -j) for j in range(rounds))


def test_the_square_root_and_its_inverse():
    root = toeplitz.square_root(5)
    assert root.tolist() == [1, 0.5, 0.375, 0.3125, 0.2734375]
    assert toeplitz.inverse(root, 5).tolist() == [1, -0.5, -0.125, -0.0625, -0.0390625]
    assert np.allclose(dense(root, 5) @ dense(root, 5), np.tril(np.ones((5, 5))))
    assert toeplitz.inverse_square_root(4).tolist() == [1, -0.5, -0.125, -0.0625]
    # Its mean error times its sensitivity for one use.
    root = toeplitz.square_root(1000)
    loss = math.sqrt(toeplitz.prefix_errors(root, 1000).mean()) * np.linalg.norm(root)
    assert loss <= 1 + math.log(1000) / math.pi


@pytest.mark.parametrize(
    ("rounds", "bands", "loss"),
    [(16, 4, 3.75402357), (100, 10, 8.68187390), (128, 8, 11.78428617), (1000, 16, 39.41531727)],
)
def test_optimised_bands(rounds, bands, loss):
    column, found = toeplitz.optimised_bands(rounds, bands)
    assert found == pytest.approx(loss, **CLOSE)
    assert np.linalg.norm(column) == pytest.approx(1.0)
    if rounds == 16:
        assert column == pytest.approx([0.7948752815, 0.4384330416, 0.3292740798, 0.2598621468], **CLOSE)
        assert toeplitz.sensitivity(column, 16, separation=4, participations=4) ** 2 == pytest.approx(4.0, **CLOSE)
        apart = toeplitz.sensitivity(column, 16, separation=2, participations=8)
        assert apart**2 == pytest.approx(13.08334595, **CLOSE)


def test_a_cut_inverse_root():
    column = toeplitz.inverse(toeplitz.inverse_square_root(8), 1000)
    size = toeplitz.sensitivity(column, 1000, separation=100, participations=10)
    error = toeplitz.prefix_errors(column, 1000).mean()
    assert size**2 == pytest.approx(18.75475685, **CLOSE)
    assert error == pytest.approx(23.32787518, **CLOSE)
    assert size * math.sqrt(error) == pytest.approx(20.916707, **CLOSE)
    identity = toeplitz.sensitivity([1.0], 1000, separation=100, participations=10)
    assert identity * math.sqrt(toeplitz.prefix_errors([1.0], 1000).mean()) == pytest.approx(70.746025, **CLOSE)


@pytest.mark.parametrize(
    ("rounds", "separation", "participations", "error", "theta", "omega", "product"),
    [
        (1000, 100, 10, "mean", (0.9816634886, 0.5777682738), (0.2502350377, 0.2573454592), 12.19385),
        (1000, 100, 10, "max", (0.9860718692, 0.6231442596), (0.2313185541, 0.2725380606), 14.952975),
        (2000, 400, 5, "max", None, None, 9.501514),
    ],
)
def test_two_buffers(rounds, separation, participations, error, theta, omega, product):
    options = {"separation": separation, "participations": participations}
    found = toeplitz.optimised_buffers(rounds, error=error, **options)
    column = toeplitz.buffered(*found, rounds)
    errors = toeplitz.prefix_errors(column, rounds)
    size = toeplitz.sensitivity(column, rounds, **options)
    value = size * math.sqrt(errors.mean() if error == "mean" else errors.max())
    assert value == pytest.approx(product, **CLOSE)
    if theta is not None:
        # The least is flat: where the value is right to 1e-12, the decays are to 1e-6.
        assert found[0] == pytest.approx(theta, abs=1e-6)
        assert found[1] == pytest.approx(omega, abs=1e-6)


def brute_force(column, rounds, separation, participations):
    """The largest change over all patterns of at most so many uses, each of them 1 (`C >= 0`: in one direction)."""
    matrix = np.abs(dense(column, rounds))

    def patterns(first, left):
        yield []
        if left:
            for use in range(first, rounds):
                for rest in patterns(use + separation, left - 1):
                    yield [use, *rest]

    return max(np.linalg.norm(matrix[:, uses].sum(1)) for uses in patterns(0, participations))


@pytest.mark.parametrize("column", [[1.0, 0.5, 0.3, 0.2], [1.0], toeplitz.square_root(7)], ids=["bands", "one", "root"])
@pytest.mark.parametrize(("separation", "participations"), [(1, 1), (1, 3), (2, 3), (3, 2)])
def test_sensitivity_of_what_falls_is_exact(column, separation, participations):
    found = toeplitz.sensitivity(column, 7, separation=separation, participations=participations)
    assert found == pytest.approx(brute_force(column, 7, separation, participations))


def test_the_formula_alone_would_be_too_small_where_a_column_rises():
    column = [1.0, 0.0, 0.9]
    literal = np.linalg.norm(dense(column, 5)[:, :2].sum(1)) ** 2  # uses 0 and 1, as the theorem takes them
    true = brute_force(column, 5, 1, 2) ** 2
    assert literal == pytest.approx(3.62)
    assert true == pytest.approx(5.42)
    assert toeplitz.sensitivity(column, 5, separation=1, participations=2) ** 2 == pytest.approx(8.66)


def test_what_an_attacker_of_all_rounds_faces():
    column, _ = toeplitz.optimised_bands(200, 20)
    shown = np.linalg.norm(toeplitz.inverse(column, 200)[:101])
    faced = toeplitz.attacker_std(column, 200, [100])
    assert faced == pytest.approx(1.0, rel=1e-6)  # `|c| = 1`
    assert shown > 1.9 * faced
    indicator = np.zeros(200)
    indicator[[3, 40]] = 1
    expected = math.sqrt(2) / np.linalg.norm(dense(column, 200) @ indicator)
    assert toeplitz.attacker_std(column, 200, [3, 40]) == pytest.approx(expected)


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match="`separation`"):
        toeplitz.sensitivity([1.0], 5, separation=0)
    with pytest.raises(InputError, match="no inverse"):
        toeplitz.inverse([0.0, 1.0], 3)
    with pytest.raises(InputError, match="`bands`"):
        toeplitz.optimised_bands(4, 5)
    with pytest.raises(InputError, match="mean"):
        toeplitz.optimised_buffers(10, error="median")
