"""GI, RLG and LLG against plain loops, and on the batches that each is made for."""

import pytest
import torch
import torch.nn.functional as F

from gradguard import InputError
from gradguard.attacks._labels.baselines import gi_counts, llg_counts, llg_statistics, rlg_counts
from gradguard.leakage.labels import count_labels


def problem(batch=6, classes=30, width=50, seed=0):
    """Weight gradient of a head on non-negative features, its parameters, the labels (each class once)."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(classes, generator=generator, dtype=torch.float64)
    features = torch.rand(batch, width, generator=generator, dtype=torch.float64)
    labels = torch.randperm(classes, generator=generator)[:batch]
    slopes = (F.linear(features, weight, bias).softmax(1) - F.one_hot(labels, classes)) / batch
    return slopes.T @ features, weight, bias, features, labels


def plain_llg(weight_gradient, batch_size, impact, offsets):
    """The algorithm as it is told: one label at a time."""
    sums = weight_gradient.sum(1).tolist()
    counts = [0] * len(sums)
    for c, g in enumerate(sums):
        if g < 0:
            counts[c] = 1
            sums[c] -= impact
    sums = [g - s for g, s in zip(sums, offsets.tolist(), strict=True)]
    while sum(counts) < batch_size:
        c = min(range(len(sums)), key=lambda i: sums[i])
        counts[c] += 1
        sums[c] -= impact
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_distinct_labels_are_found_by_each(seed):
    gradient, weight, bias, features, labels = problem(seed=seed)
    true = count_labels(labels, 30)
    assert torch.equal(gi_counts(gradient, 6), true)
    assert torch.equal(llg_counts(gradient, 6), true)
    impact, offsets = llg_statistics(features, weight, bias, 6)
    assert torch.equal(llg_counts(gradient, 6, impact=impact, offsets=offsets), true)


def test_rlg_finds_the_classes_of_a_confident_head():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    features = torch.randn(8, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(40, (8,), generator=generator)
    slopes = ((features @ weight.T).softmax(1) - F.one_hot(labels, 40)) / 8
    assert torch.equal(rlg_counts(slopes.T @ features, 8) > 0, count_labels(labels, 40) > 0)


def test_llg_equals_plain_loops():
    gradient, weight, bias, features, _ = problem(batch=6)
    impact, offsets = llg_statistics(features, weight, bias, 25)
    expected = plain_llg(gradient, 25, impact, offsets)
    assert llg_counts(gradient, 25, impact=impact, offsets=offsets).tolist() == expected
    assert sum(expected) == 25


def test_an_impact_that_is_not_negative_is_refused():
    gradient, *_ = problem()
    with pytest.raises(InputError, match=r"`impact` must be negative .* got 0\.5"):
        llg_counts(gradient, 6, impact=0.5)
