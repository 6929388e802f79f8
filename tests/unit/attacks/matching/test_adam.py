"""Batched Adam against PyTorch's own."""

import pytest
import torch

from gradguard import InputError
from gradguard.attacks._matching.adam import Adam


def valley(x):
    """`10 + sum_i i x_i^2 / 2 + sin(x_i)`, row by row."""
    scale = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return 10 + (scale * x**2 / 2 + x.sin()).sum(1), scale * x + x.cos()


def starts(trials=3, n=5):
    return torch.randn(trials, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def advanced(options, start, steps, **more):
    search = options.search(start, **more)
    for _ in range(steps):
        search.advance(valley)
    return search


@pytest.mark.parametrize("sign", [None, "hard"])
@pytest.mark.parametrize("decay", [None, "step", "cosine"])
def test_it_takes_pytorchs_steps(sign, decay):
    steps = 40
    found = advanced(Adam(iterations=steps, learning_rate=0.05, sign=sign, decay=decay), starts(), steps)
    x = starts().clone().requires_grad_(True)
    reference = torch.optim.Adam([x], lr=0.05)
    if decay == "step":
        schedule = torch.optim.lr_scheduler.MultiStepLR(reference, [15, 25, 35], gamma=0.1)
    elif decay == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, steps)
    for _ in range(steps):
        gradient = valley(x.detach())[1]
        x.grad = gradient.sign() if sign else gradient
        reference.step()
        if decay:
            schedule.step()
    torch.testing.assert_close(found.x, x.detach(), rtol=1e-10, atol=1e-10)


def test_soft_signs_are_between_the_sign_and_the_derivative():
    search = Adam(iterations=10, sign="soft").search(starts())
    gradient = torch.tensor([[3.0, -0.01, 0.5]], dtype=torch.float64)
    first = search._signed(gradient, torch.zeros(1, 1, dtype=torch.float64))
    last = search._signed(gradient, torch.full((1, 1), 0.9999, dtype=torch.float64))
    torch.testing.assert_close(first, gradient.tanh())
    torch.testing.assert_close(last, gradient, rtol=1e-5, atol=0)


def test_the_rate_warms_up():
    options = Adam(iterations=100, learning_rate=0.1, sign="hard", decay=None, warm_up=10)
    first = advanced(options, starts(), 1)
    torch.testing.assert_close((first.x - starts()).abs(), torch.full_like(first.x, 0.01), rtol=1e-6, atol=0)


def test_the_best_point_is_kept_and_a_broken_trial_stands_still():
    def broken(x):
        value, gradient = valley(x)
        return torch.where(torch.arange(len(x)) == 1, torch.nan, value), gradient

    search = Adam(iterations=30, learning_rate=3.0, decay=None).search(starts())
    seen = []
    for _ in range(30):
        seen.append(valley(search.x)[0])
        search.advance(broken)
    assert search.broken.tolist() == [False, True, False]
    best = torch.stack(seen).amin(0)
    torch.testing.assert_close(search.value[[0, 2]], best[[0, 2]])
    torch.testing.assert_close(valley(search.point)[0][[0, 2]], best[[0, 2]])
    assert torch.isinf(search.value[1])


def test_a_trial_begun_anew_does_what_a_new_one_does():
    options = Adam(iterations=20, learning_rate=0.1)
    search = advanced(options, starts(), 7)
    other = starts(trials=3) + 1
    search.begin(torch.tensor([False, True, False]), other)
    fresh = options.search(other)
    for _ in range(5):
        search.advance(valley)
        fresh.advance(valley)
    torch.testing.assert_close(search.x[1], fresh.x[1])
    assert not torch.allclose(search.x[0], fresh.x[0])


def test_points_stay_in_the_box():
    search = advanced(Adam(iterations=50, learning_rate=0.5), 3 + starts(), 20, project=lambda x: x.clamp(1, 4))
    assert search.x.min() == 1
    assert (search.point >= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "`iterations` must be at least 1"),
        ({"learning_rate": float("nan")}, "`learning_rate` positive"),
        ({"warm_up": -1}, "`warm_up` not negative"),
        ({"sign": "maybe"}, '`sign` must be "hard", "soft" or None'),
        ({"decay": "linear"}, '`decay` must be "step", "cosine" or None'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Adam(**options)
