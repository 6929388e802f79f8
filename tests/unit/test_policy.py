"""What a policy says of a gradient's numbers."""

import pytest

from gradguard import InputError, Policy, ThreatModel

GOOD = {"predicted_error": 0.2, "attacked_psnr": 12.0, "label_recovery": 0.5}
NAN = float("nan")


def test_a_gradient_that_meets_the_policy():
    assert Policy().complaints(GOOD) == []
    assert Policy(maximum_label_recovery=0.5).complaints(GOOD) == []  # at the threshold is fine
    assert Policy(minimum_predicted_error=0.2, maximum_attacked_psnr=12.0).complaints(GOOD) == []


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        ({"predicted_error": 0.05}, "the predicted error of gradient matching is 0.05 of the value range, below 0.1"),
        ({"attacked_psnr": 31.26}, "an attack reconstructs an example at 31.3 dB, above 20.0 dB"),
        ({"label_recovery": 0.75}, "75% of the labels are recovered, more than 50%"),
    ],
)
def test_each_threshold_has_its_sentence(measures, sentence):
    policy = Policy(maximum_label_recovery=0.5)
    assert policy.complaints(GOOD | measures) == [sentence]


def test_every_complaint_is_heard():
    bad = {"predicted_error": 0.0, "attacked_psnr": float("inf"), "label_recovery": 1.0}
    assert len(Policy(maximum_label_recovery=0.5).complaints(bad)) == 3


@pytest.mark.parametrize("name", GOOD)
def test_what_is_not_a_number_fails(name):
    policy = Policy(maximum_label_recovery=0.9)
    assert policy.complaints(GOOD) == []
    assert len(policy.complaints(GOOD | {name: NAN})) == 1


def test_labels_are_not_judged_by_default():
    assert Policy().complaints(GOOD | {"label_recovery": 1.0}) == []


@pytest.mark.parametrize(
    "policy", [Policy(minimum_predicted_error=None, maximum_attacked_psnr=None, maximum_label_recovery=None)]
)
def test_thresholds_left_out_are_skipped(policy):
    assert policy.complaints({"predicted_error": 0.0, "attacked_psnr": 300.0, "label_recovery": 1.0}) == []
    assert policy.complaints(dict.fromkeys(GOOD, NAN)) == []


def test_what_was_not_measured_is_not_judged():
    assert Policy(maximum_label_recovery=0.0).complaints({}) == []
    assert len(Policy().complaints({"attacked_psnr": 50.0})) == 1


def test_thresholds_of_zero_are_thresholds():
    """0 is a value, not an absence."""
    assert len(Policy(maximum_attacked_psnr=0.0).complaints({"attacked_psnr": 1.0})) == 1
    assert len(Policy(maximum_label_recovery=0.0).complaints({"label_recovery": 0.1})) == 1
    assert Policy(minimum_predicted_error=0.0).complaints({"predicted_error": 0.0}) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy(minimum_predicted_error=-0.1), "`minimum_predicted_error` must not be negative, got -0.1"),
        (lambda: Policy(maximum_label_recovery=1.1), r"`maximum_label_recovery` must be in \[0, 1\], got 1.1"),
        (lambda: Policy(maximum_label_recovery=NAN), r"`maximum_label_recovery` must be in \[0, 1\], got nan"),
        (lambda: ThreatModel(max_attacked=0), "`max_attacked` must be at least 1, got 0"),
        (lambda: ThreatModel(value_range=(1.0, 1.0)), r"low < high, got \(1.0, 1.0\)"),
        (lambda: ThreatModel(value_range=(1.0, -1.0)), r"low < high, got \(1.0, -1.0\)"),
        (lambda: ThreatModel(value_range=(0.0, NAN)), r"low < high, got \(0.0, nan\)"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_worst_case_is_the_default():
    threat = ThreatModel()
    assert threat.others_known
    assert threat.labels_known
