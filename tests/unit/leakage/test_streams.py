"""Floors of streams against dense float64 matrices of the whole stream."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.leakage import bayes_floor, cramer_rao_floor
from gradguard.leakage.streams import effective_std, stream_floor, stream_precision
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.linalg.toeplitz import inverse, optimised_bands, square_root

PRIOR = PowerLawPrior(std=0.3)


def jacobian(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return InputJacobian(LossGradient(model, nn.CrossEntropyLoss()), x, torch.tensor([1, 2]))


@pytest.fixture(scope="module")
def jacobians():
    return [jacobian(seed) for seed in range(3)]


def dense_floor(jacobians, column, std, used, rounds, spread, prior):
    """From the covariance of all messages at once; the other rounds' gradients are normal with `spread`."""
    c = sum(np.diag(np.full(rounds - j, a), -j) for j, a in enumerate(column[:rounds]))
    s = std**2 * np.linalg.inv(c.T @ c)
    for t in set(range(rounds)) - set(used):
        s[t, t] += (std * spread) ** 2
    p = np.linalg.inv(s)
    out = []
    for r in range(2):
        js = [j.dense()[r].numpy() for j in jacobians]
        f = sum(p[a, b] * js[i] @ js[k].T for i, a in enumerate(used) for k, b in enumerate(used))
        if prior is not None:
            root = prior.sqrt(torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)).reshape(16, 16).numpy()
            f = f + np.linalg.inv(root @ root.T)
        out.append(np.trace(np.linalg.inv(f)) / 16)
    return out


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["Cramer-Rao", "Bayes"])
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_a_floor_is_that_of_the_dense_stream(jacobians, spread, prior):
    column, used = square_root(8), [1, 3, 6]
    got = stream_floor(jacobians, column, 0.05, used, prior=prior, spread=spread).mse
    want = dense_floor(jacobians, column, 0.05, used, 8, spread, prior)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_without_correlation_it_is_the_floor_of_rounds(jacobians):
    one = jacobians[0]
    column = [1.0, 0, 0, 0]
    got = stream_floor([one] * 3, column, 0.1, [0, 1, 3], prior=PRIOR).mse
    torch.testing.assert_close(got, bayes_floor(one, PRIOR, 0.01, rounds=3).mse, rtol=1e-6, atol=0)
    got = stream_floor([one] * 3, column, 0.1, [0, 1, 3]).mse
    torch.testing.assert_close(got, cramer_rao_floor(one, 0.01, rounds=3).mse, rtol=1e-5, atol=0)


def test_the_worst_case_the_single_message_and_between():
    c = np.pad(optimised_bands(200, 8)[0], (0, 192))
    known, between, alone = (effective_std(c, 200, 100, spread=s) for s in (0.0, 1.0, math.inf))
    assert known == pytest.approx(1.0, rel=1e-9)
    assert alone == pytest.approx(np.linalg.norm(inverse(c, 101)), rel=1e-6)
    assert known < between < alone


def test_learning_rates_are_those_of_the_matrix():
    rates = [1.0, 1.0, 0.1]
    c = np.array([[1, 0, 0], [0.5, 1, 0], [0.375, 0.5, 1]]) * np.array(rates)[None] / np.array(rates)[:, None]
    got = stream_precision(square_root(3), 3, [0, 2], learning_rates=rates)
    np.testing.assert_allclose(got, (c.T @ c)[np.ix_([0, 2], [0, 2])], rtol=1e-12)


def test_what_is_refused(jacobians):
    for call in (
        lambda: stream_floor(jacobians, [1.0, 0, 0], 0.1, [0, 1]),
        lambda: stream_floor(jacobians, [1.0, 0, 0], 0.0, [0, 1, 2]),
        lambda: stream_precision([1.0], 3, [3]),
        lambda: stream_precision([1.0], 3, [1], spread=-1),
    ):
        with pytest.raises(InputError):
            call()
