"""What the rank benchmarks are made of: the rule for a verdict, the architectures, the attack, the noise."""

import math

import pytest
import torch
from torch import nn

from common import benchmark_parser
from gradguard.attacks import RGAP
from gradguard.functional.vectors import norm
from gradguard.leakage import rank_analysis
from gradguard.zoo.models import digits_convnet
from rank_advice import trained
from rank_verdicts import CASES, GREY, attacked, cnn6_at, convnet, observed
from rgap_noise import eight_bits, noisy


@pytest.fixture
def options(tmp_path):
    return benchmark_parser("A test.").parse_args(["--quick", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    ("psnr", "verdict"),
    [
        ({"RGAP": 60.1, "HGAP": 60.1, "DLG": 5.0}, "closed form"),
        ({"RGAP": 59.9, "HGAP": 5.0, "DLG": 40.1}, "optimisation only"),
        ({"RGAP": math.nan, "HGAP": math.nan, "DLG": 40.1}, "optimisation only"),
        ({"RGAP": 20.0, "HGAP": 30.0, "DLG": 5.0}, "not recoverable"),
        ({"RGAP": 20.0, "HGAP": 35.0, "DLG": 5.0}, "in between"),
        ({"RGAP": 45.0, "HGAP": 35.0, "DLG": 5.0}, "in between"),  # R-GAP alone is no optimisation
        ({"RGAP": 29.0, "HGAP": math.nan, "DLG": 29.0}, "not recoverable"),
    ],
)
def test_what_the_attacks_say(psnr, verdict):
    assert observed(psnr) == verdict


def test_the_architectures_span_the_verdicts():
    verdicts = [rank_analysis(case.make(), case.shape).verdict for case in CASES]
    assert len({case.name for case in CASES}) == len(CASES) >= 8
    assert min(verdicts.count(v) for v in ("closed form", "optimisation only", "not recoverable")) >= 5


def test_a_narrow_second_layer_stops_rgap_and_a_wide_one_does_not(options, digits_pair):
    x, y = digits_pair
    torch.manual_seed(0)
    wide, narrow = digits_convnet().double(), convnet(GREY, (3, 3, 1, 1), (4, 3, 2, 1)).double()
    assert attacked(options, RGAP(), wide, x, y, 0) > 120
    assert attacked(options, RGAP(), narrow, x, y, 0) < 30


def test_what_an_attack_refuses_is_no_number(options, digits_pair):
    model = convnet(GREY, (4, 3, 1, 1), pool=lambda: nn.MaxPool2d(2)).double()
    assert math.isnan(attacked(options, RGAP(), model, *digits_pair, 0))


@pytest.fixture
def digits_pair(batch):
    """A digit in float64, and its class."""
    return batch[0][:1].double(), int(batch[1][0])


def test_cnn6_takes_other_sizes():
    assert cnn6_at(40, 36)(torch.zeros(1, 3, 40, 40)).shape == (1, 1)


def test_training_learns_and_follows_the_seed(options):
    from gradguard.zoo.pictures import digits

    first, again = (trained(options, digits_convnet, digits(), 0, 150) for _ in range(2))
    assert first == again > 0.7
    assert trained(options, digits_convnet, digits(), 0, 1) < 0.5


def test_noise_has_the_ratio_that_is_asked(options):
    gradient = {"a": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    sent = noisy(gradient, 0, ratio=0.25, options=options)
    assert float(norm({n: sent[n] - gradient[n] for n in gradient}) / norm(gradient)) == pytest.approx(0.25)


def test_eight_bits_are_255_levels():
    value = torch.linspace(-1, 2, 1001, dtype=torch.float64)
    rounded = eight_bits(value)
    step = 2 / 127
    assert (rounded - value).abs().max() <= step / 2 + 1e-12
    assert torch.allclose(rounded / step, (rounded / step).round())
    assert rounded.max() == 2
