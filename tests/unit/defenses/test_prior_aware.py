"""Prior-aware noise: the rule against a dense optimum, and what it leaves of a real picture."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar

import gradguard as gg
from gradguard.defenses import Release
from gradguard.defenses.laws import PriorAware, PriorDirections, SmallEigenspace
from gradguard.defenses.laws.prior_aware import water_filling
from gradguard.defenses.stream import NoiseStream
from gradguard.leakage import bayes_floor
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits

KEY = b"k" * 32


@pytest.fixture(scope="module")
def digit():
    pictures = digits()
    torch.manual_seed(0)  # of the model's weights
    function = gg.LossGradient(digits_convnet().double().eval(), torch.nn.CrossEntropyLoss())
    return Release(loss_gradient=function, inputs=pictures.images[:1].double(), targets=pictures.labels[:1])


def test_water_filling_meets_its_budget_and_no_other_level_does_better():
    generator = torch.Generator().manual_seed(0)
    c, w = torch.rand(2, 1, 40, generator=generator, dtype=torch.float64)
    w = w**4
    f = water_filling(c, w, w, 0.5)
    assert (f * w).sum().item() == pytest.approx(0.5, rel=1e-9)

    def floor(exponent):
        """Another spectrum of the same budget: a power of the optimal one."""
        g = f**exponent
        g = g * 0.5 / (g * w).sum()
        return -(c * g / (1 + g)).sum().item()

    best = minimize_scalar(floor, bounds=(0.2, 5.0), method="bounded")
    assert best.x == pytest.approx(1.0, abs=1e-3)


def test_a_small_budget_leaves_most_directions_alone():
    w = torch.tensor([[1.0, 1e-2, 1e-4]], dtype=torch.float64)
    f = water_filling(torch.ones_like(w), w, w, 1e-5)
    assert (f > 0).tolist() == [[False, False, True]]


def floor_of(way, jacobian, size):
    """The Bayes floor of a law's displacement in dB, at the expected norm `size` of `J^T d`."""
    n = jacobian.size
    noise = NoiseStream(KEY).message()
    found = way(jacobian, noise, size)
    rows = jacobian.dense()[0]
    eye = torch.eye(n, dtype=torch.float64).reshape(n, 1, *jacobian.inputs.shape[1:])
    k = torch.stack([found.covariance(e).flatten() for e in eye])
    k = k * size**2 / torch.trace(k @ rows @ rows.T)
    return bayes_floor(jacobian, PowerLawPrior(), covariance=lambda u: (u.flatten(1) @ k).reshape(u.shape)).psnr.item()


@pytest.mark.parametrize(("ratio", "slack"), [(0.02, 1.0), (0.05, 1.0), (0.2, 0.0), (0.5, 0.0)])
def test_it_leaves_the_least_at_the_same_norm(digit, ratio, slack):
    """The best of the three, but for less than 1 dB below 10%: the rule takes it that prior and `J J^T` commute."""
    laws = (PriorAware(), PriorDirections(), SmallEigenspace())
    floors = {law.name: floor_of(law.displacement, digit.jacobian, ratio * digit.norm) for law in laws}
    assert floors["PriorAware"] <= min(floors.values()) + slack


def test_lanczos_comes_close_to_the_exact_rule(digit):
    law = PriorAware(steps=40)
    flat = NoiseStream(KEY).message().normal("inputs", (1, digit.jacobian.size))
    exact, lanczos = (
        floor_of(lambda jacobian, _, size, way=way: way(jacobian, flat, size), digit.jacobian, 0.1 * digit.norm)
        for way in (law._exact, law._by_lanczos)
    )
    # `c = 1` in the place of `u^T C u` gives up 1-2 dB, and never gains.
    assert 0 <= lanczos - exact < 2.5
