"""The report object: what follows from its numbers, and its plain forms."""

import dataclasses
import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from gradguard.report import AttackScore, LeakageReport


def psnr_only(*psnr: float) -> AttackScore:
    return AttackScore(psnr=list(psnr))


def test_to_dict_holds_no_pictures(report: LeakageReport):
    plain = report.to_dict()
    text = json.dumps(plain)
    assert "pictures" not in text
    assert "originals" not in text
    assert "tensor" not in text.lower()


def test_to_dict_is_plain_json_that_comes_back_the_same(report: LeakageReport):
    plain = report.to_dict()
    assert json.loads(report.to_json()) == plain
    assert plain["attacks"]["DLG"]["with"]["psnr"] == report.attacks["DLG"]["with"].psnr
    assert plain["verdict"]["decision"] == "perturb"
    assert plain["label_recovery"]["with"]["i_rec"] == 0.667
    assert plain["extra"]["accuracy"] == {"without": 0.952, "with": 0.944}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null(bare: LeakageReport, value: float):
    report = dataclasses.replace(
        bare,
        predicted_error=[value],
        attacked=[0],
        attacks={"DLG": {"without": psnr_only(value)}},
        extra={"nested": {"deep": [value, 1.0]}},
    )
    plain = json.loads(report.to_json())
    assert plain["predicted_error"] == [None]
    assert plain["attacks"]["DLG"]["without"]["psnr"] == [None]
    assert plain["extra"]["nested"]["deep"] == [None, 1.0]


def test_pictures_are_in_no_repr(report: LeakageReport):
    assert "tensor" not in repr(report)


def test_worst_example_is_the_best_reconstructed_one_of_the_defended_gradient(bare: LeakageReport):
    report = dataclasses.replace(
        bare,
        defense="noise",
        labels=[5, 6, 7, 8],
        predicted_error=[0.1, 9.0, 9.0, 9.0],
        attacked=[3, 1],
        attacks={
            "a": {"without": psnr_only(99.0, 10.0), "with": psnr_only(10.0, 12.0)},
            "b": {"without": psnr_only(99.0, 10.0), "with": psnr_only(11.0, 9.0)},
        },
    )
    assert report.worst_example() == 1
    assert report.worst_class() == "6"
    assert report.best_psnr("with") == 12.0
    assert report.best_psnr("without") == 99.0


def test_worst_example_without_a_defense_is_judged_on_the_bare_gradient(bare: LeakageReport):
    report = dataclasses.replace(bare, labels=[0, 1], attacked=[0, 1], attacks={"a": {"without": psnr_only(8.0, 9.0)}})
    assert report.worst_example() == 1


def test_worst_example_without_attacks_has_the_lowest_predicted_error(bare: LeakageReport):
    report = dataclasses.replace(bare, labels=[0, 1, 2], predicted_error=[3.0, 1.0, 2.0])
    assert report.worst_example() == 1


def test_worst_example_skips_what_is_not_a_number(bare: LeakageReport):
    report = dataclasses.replace(bare, labels=[0, 1, 2], predicted_error=[math.nan, 2.0, 1.0])
    assert report.worst_example() == 2
    attacked = dataclasses.replace(report, attacked=[0, 1], attacks={"a": {"without": psnr_only(math.nan, 3.0)}})
    assert attacked.worst_example() == 1
    # What is missing may be the best: a maximum that skipped it would hide it.
    assert math.isnan(attacked.best_psnr("without"))
    assert dataclasses.replace(bare, predicted_error=[math.nan]).worst_example() is None


def test_a_failed_attack_does_not_decide_the_worst_example(bare: LeakageReport):
    report = dataclasses.replace(
        bare,
        labels=[0, 1],
        predicted_error=[2.0, 1.0],
        attacked=[0],
        attacks={"a": {"without": AttackScore(failure="no")}},
    )
    assert report.worst_example() == 1
    assert report.best_psnr("without") is None


def test_worst_example_of_nothing(bare: LeakageReport):
    report = dataclasses.replace(bare, labels=[], predicted_error=[])
    assert report.worst_example() is None
    assert report.worst_class() is None


def test_class_name_falls_back_on_the_number(bare: LeakageReport):
    report = dataclasses.replace(bare, class_names=("cat", "dog"))
    assert [report.class_name(label) for label in (0, 1, 2, -1)] == ["cat", "dog", "2", "-1"]


def test_plot_gives_a_figure(bare: LeakageReport):
    assert isinstance(bare.plot(), Figure)


def test_the_fixture_is_as_a_guard_would_make_it(report: LeakageReport):
    assert report.originals is not None
    for cases in report.attacks.values():
        for score in cases.values():
            if score.failure is None:
                assert score.pictures is not None
                assert len(score.psnr) == len(score.pictures) == len(report.attacked)
                mse = (score.pictures - report.originals).square().flatten(1).mean(1)
                torch.testing.assert_close(torch.tensor(score.psnr), -10 * mse.log10(), atol=1e-2, rtol=1e-3)
