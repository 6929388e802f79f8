"""What the reproduction of gradient matching is made of: its figures, its problems, its parts at their smallest."""

import json
import math
import sys

import pytest
import torch
from torch import nn

import reproduce_matching
from common import benchmark_parser
from gradguard.attacks import IDLG, InvertingGradients
from gradguard.functional.local_training import LocalTraining
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits
from reproduce_matching import PARTS, attacked, best, gains, label_share, problem, psnrs


@pytest.fixture
def options(tmp_path):
    return benchmark_parser("A test.").parse_args(["--quick", "--data", str(tmp_path)])


@pytest.fixture
def task(options):
    """Two digits, one at a time."""
    return problem(options, "small", lambda: digits_convnet().double(), digits(), count=2)


def test_psnr_is_capped_and_zero_where_nothing_was_found():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert psnrs(x.flip(0), x).tolist() == [400.0] * 3  # the order says nothing
    assert psnrs(None, x).tolist() == [0.0] * 3
    assert psnrs(x.clamp(0, 0.8) + 0.1, x.clamp(0, 0.8)).tolist() == pytest.approx([20.0] * 3, abs=1e-4)


def test_best_pictures():
    assert best(torch.tensor([[1.0, 9.0, 5.0, 7.0]]), 2) == 8.0


@pytest.mark.parametrize(
    ("found", "truth", "share"), [([0, 1, 1], [1, 0, 1], 1.0), ([0, 0, 2], [0, 1, 2], 2 / 3), ([3, 3], [1, 2], 0.0)]
)
def test_label_share_is_of_counts(found, truth, share):
    assert label_share(torch.tensor(found), torch.tensor(truth), 4) == pytest.approx(share)


def test_mean_picture_knows_the_others_only(options, task):
    others = digits().images[2:].mean(0)
    errors = [(others - x).square().mean() for x in digits().images[:2]]
    expected = sum(-10 * math.log10(e) for e in errors) / 2
    assert task.mean_picture() == pytest.approx(expected, abs=1e-3)


def test_a_row_scores_what_was_found(options, task):
    row, found, psnr = attacked(options, task, IDLG(restarts=1, polish=20), task.observations(labels_known=False))
    assert psnr.shape == (2, 1)
    assert row["psnr_min"] > 60 > row["mean_picture"]
    assert row["psnr_mean"] == pytest.approx(psnr.mean().item())
    assert row["prior_only"] == pytest.approx(12.04, abs=0.01)
    assert [int(r.labels) for r in found] == task.labels.flatten().tolist()


def test_local_steps_are_sent_and_known_to_the_attacker(options):
    task = problem(options, "small", digits_convnet, digits(), count=1, batch=4)
    local = LocalTraining(steps=2, learning_rate=0.1)
    alone, several = (task.observations(labels_known=True, local=way)[0] for way in (None, local))
    assert several.local == local
    assert several.matching_loss(task.batches[0], task.labels[0]) < 1e-9
    assert alone.matching_loss(task.batches[0], task.labels[0]) < 1e-9
    assert any(not torch.allclose(alone.sent[n], g) for n, g in several.sent.items())


def test_gains_are_against_both_baselines():
    rows = [
        {"labels": "one vector", "best_6": 10.0},
        {"labels": "each its own", "best_6": 15.0},
        {"labels": "iLRG", "best_6": 20.0},
    ]
    bars = gains("x", "published", rows, 6.0)
    assert [bar.value for bar in bars] == [10.0, 5.0]
    assert [bar.holds for bar in bars] == [True, False]


def test_labels_in_four_ways(options):
    task = problem(options, "small", digits_convnet, digits(), count=1, batch=3)
    rows = reproduce_matching.label_rows(options, task, InvertingGradients(iterations=2))
    assert [row["labels"] for row in rows] == ["one vector", "each its own", "iLRG", "known"]
    assert rows[3]["labels_right"] == 1.0


def test_the_networks_of_dlg():
    model = reproduce_matching.small_convnet()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any(isinstance(m, nn.ReLU) for m in model)
    weights = torch.cat([p.flatten() for p in reproduce_matching.dlg_lenet(in_channels=3, image_size=32).parameters()])
    assert 0.49 < weights.abs().max() <= 0.5


def test_a_part_alone_is_kept_under_its_own_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("common.RESULTS", tmp_path)
    monkeypatch.setitem(PARTS, "dlg", lambda options: ([{"network": "x", "psnr_median": 41.0, "data": "y"}], []))
    monkeypatch.setattr(sys, "argv", ["reproduce_matching.py", "--quick", "--json", "--save", "--parts", "dlg"])
    reproduce_matching.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["figures"] == {"dlg": [{"network": "x", "psnr_median": 41.0, "data": "y"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["reproduce_matching_dlg-quick-cpu.json"]
