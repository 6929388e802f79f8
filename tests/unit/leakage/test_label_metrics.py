"""LeAcc, LnAcc and IRec, by the paper's conventions."""

import pytest
import torch

from gradguard import InputError
from gradguard.leakage.labels import count_labels, label_recovery


def counts(*values):
    return torch.tensor(values)


def test_by_hand():
    # Right, overcounted, missed, invented, rightly absent, undercounted.
    recovery = label_recovery(counts(3, 4, 0, 1, 0, 2), counts(3, 2, 1, 0, 0, 4))
    assert recovery.le_acc == pytest.approx(4 / 6)
    assert recovery.ln_acc == pytest.approx(2 / 6)
    assert recovery.i_rec == pytest.approx((3 + 2 + 0 + 0 + 0 + 2) / 10)


def test_numbers_of_the_authors_logs():
    # MNIST, batch 24, experiment 15 of their first log: one count too many, and still all examples recalled.
    true = counts(2, 1, 3, 1, 0, 6, 2, 4, 3, 2)
    recovered = counts(2, 1, 3, 1, 0, 6, 2, 5, 3, 2)
    recovery = label_recovery(recovered, true)
    assert (recovery.le_acc, recovery.ln_acc, recovery.i_rec) == (1.0, pytest.approx(0.9), 1.0)


def test_all_right_is_one():
    recovery = label_recovery(counts(0, 5, 1), counts(0, 5, 1))
    assert (recovery.le_acc, recovery.ln_acc, recovery.i_rec) == (1.0, 1.0, 1.0)


def test_an_answer_of_nothing_looks_good_only_without_instance_recall():
    true = torch.zeros(1000, dtype=torch.int64)
    true[:24] = 1
    recovery = label_recovery(torch.zeros(1000, dtype=torch.int64), true)
    assert recovery.le_acc == pytest.approx(0.976)
    assert recovery.ln_acc == pytest.approx(0.976)
    assert recovery.i_rec == 0


def test_float_counts_are_counts_too():
    assert label_recovery(torch.tensor([1.0, 2.0]), counts(1, 2)).ln_acc == 1


@pytest.mark.parametrize(
    ("recovered", "true", "message"),
    [
        (counts(1, 2), counts(1, 2, 0), "counts 2 classes, `true` 3"),
        (counts(-1, 2), counts(1, 2), "`recovered` must hold whole numbers of examples, none negative, got -1"),
        (torch.tensor([0.5, 2.0]), counts(1, 2), "`recovered` must hold whole numbers"),
        (counts(1, 2), torch.tensor([float("nan"), 2.0]), "`true` must hold whole numbers"),
        (counts(0, 0), counts(0, 0), "`true` counts no example at all"),
        (counts(1, 2)[None], counts(1, 2), r"shape \(C,\)"),
        ([1, 2], counts(1, 2), "`recovered` must be a tensor"),
    ],
)
def test_what_cannot_be_scored(recovered, true, message):
    with pytest.raises(InputError, match=message):
        label_recovery(recovered, true)


def test_count_labels():
    assert count_labels(torch.tensor([3, 0, 3]), 5).tolist() == [1, 0, 0, 2, 0]


@pytest.mark.parametrize("labels", [torch.tensor([0, 5]), torch.tensor([-1, 2])])
def test_count_labels_refuses_labels_out_of_range(labels):
    with pytest.raises(InputError, match=r"must lie in 0 \.\. 4"):
        count_labels(labels, 5)


def test_count_labels_refuses_what_is_no_class_index():
    with pytest.raises(InputError, match=r"integers of any width, got torch\.float32"):
        count_labels(torch.tensor([0.5, 1.0]), 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_count_labels_in_any_integer_dtype(dtype):
    assert count_labels(torch.tensor([3, 0, 3]).to(dtype), 5).tolist() == [1, 0, 0, 2, 0]


def test_count_labels_of_truth_values():
    assert count_labels(torch.tensor([True, False, True]), 2).tolist() == [1, 2]
