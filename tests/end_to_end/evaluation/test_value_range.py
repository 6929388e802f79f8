"""Inputs outside the threat model's range are refused everywhere, with the way out, and judged rightly with it."""

import pytest
import torch
from torch import nn

from gradguard import Guard, InputError, ThreatModel, survey
from gradguard.attacks import DLG
from gradguard.benchmark import compare, compare_initialisations
from gradguard.defenses import GaussianNoise
from gradguard.leakage.fidelity import fidelity

BYTES = ThreatModel(value_range=(0, 255), max_attacked=1)
ATTACK = DLG(restarts=2)


@pytest.fixture
def scaled():
    """A network of pictures in 0..255 that is easy to attack."""
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))

        def forward(self, x):
            return self.layers(x / 255)

    return Scaled().double()


def ways_in(model, loss_fn, x, y, **threat):
    guard = Guard(defense=GaussianNoise(noise_ratio=0.1), attacks=(), threat=ThreatModel(**threat))
    options = {"value_range": threat["value_range"]} if threat else {}
    return {
        "audit": lambda: guard.audit(model, loss_fn, x, y),
        "protect": lambda: guard.protect(model, loss_fn, x, y),
        "survey": lambda: survey(model, loss_fn, (x, y), progress=False, **options),
        "stream": lambda: survey(model, loss_fn, [(x, y)], progress=False, **options),
        "compare": lambda: compare(model, loss_fn, x, y, (), attacks=(), threat=guard.threat),
        "initialisations": lambda: compare_initialisations({"m": lambda: model}, loss_fn, x, y, seeds=[0], **options),
    }


@pytest.mark.parametrize("way", ["audit", "protect", "survey", "stream", "compare", "initialisations"])
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: (x - x.mean()) / x.std(), lambda x: x + 1e-3])
def test_inputs_outside_the_range_are_refused_with_the_way_out(way, change, scaled, cross_entropy, batch):
    x, y = change(batch[0]), batch[1]
    with pytest.raises(InputError, match=r"outside the value range \[0, 1\].*value_range=\(low, high\).*--value-range"):
        ways_in(scaled, cross_entropy, x, y)[way]()
    ways_in(scaled, cross_entropy, x, y, value_range=(x.min().item(), x.max().item()))[way]()
    ways_in(scaled, cross_entropy, x, y, value_range=None)[way]()


def test_rounding_is_no_fault(scaled, cross_entropy, batch):
    x = batch[0].clone()
    x[0, 0, 0, 0] = 1 + 1e-7
    Guard(attacks=()).audit(scaled, cross_entropy, x, batch[1])


@pytest.mark.parametrize("value_range", [BYTES.value_range, None])
def test_a_recovered_picture_in_0_to_255_is_blocked(scaled, cross_entropy, batch, value_range):
    guard = Guard(attacks=(ATTACK,), threat=ThreatModel(value_range=value_range, max_attacked=1))
    report = guard.audit(scaled, cross_entropy, 255 * batch[0], batch[1], generator=torch.Generator().manual_seed(0))
    assert report.verdict.decision == "block"
    unit = Guard(attacks=(ATTACK,), threat=ThreatModel(max_attacked=1))

    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = scaled

        def forward(self, x):
            return self.inner(255 * x)

    same = unit.audit(Times(), cross_entropy, *batch, generator=torch.Generator().manual_seed(0))
    per_element = [r.verdict.measures["predicted_error"] for r in (report, same)]
    assert per_element[0] == pytest.approx(per_element[1], abs=1e-9)
    assert report.guess_psnr == pytest.approx(same.guess_psnr, abs=1e-6)
    assert report.best_psnr("without") > 20


def test_the_truth_is_never_clamped(batch):
    x = batch[0]
    scored = fidelity(torch.zeros_like(x), 2 * x, value_range=(0.0, 1.0))
    assert scored.mse.tolist() == pytest.approx((2 * x).square().flatten(1).mean(1).tolist())


@pytest.mark.parametrize("wrong", [(1.0,), "01", (0.0, float("inf")), (1.0, 0.0)])
def test_a_range_is_two_finite_numbers(wrong):
    with pytest.raises(InputError, match="`value_range` must be"):
        ThreatModel(value_range=wrong)
