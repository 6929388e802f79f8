"""Distances between gradients, by hand."""

import pytest
import torch

from gradguard import InputError
from gradguard.attacks._matching.distances import CosineDistance, MahalanobisDistance, SquaredDistance


@pytest.fixture
def gradients():
    drawn = torch.Generator().manual_seed(0)

    def gradient(rows):
        return {
            "weight": torch.randn(rows, 3, 4, generator=drawn, dtype=torch.float64),
            "bias": torch.randn(rows, 3, generator=drawn, dtype=torch.float64),
        }

    return gradient(5), gradient(1)


def plain(own, sent, trial):
    return [(own[n][trial] - sent[n][0], own[n][trial], sent[n][0]) for n in own]


def test_weights_count_squares(gradients):
    own, sent = gradients
    found = SquaredDistance(weights={"bias": 3.0})(own, sent)
    for trial in range(5):
        (dw, _, sw), (db, _, sb) = plain(own, sent, trial)
        expected = ((dw**2).sum() + 3 * (db**2).sum()) / ((sw**2).sum() + 3 * (sb**2).sum())
        torch.testing.assert_close(found[trial], expected)


def test_a_layer_of_weight_zero_is_not_looked_at(gradients):
    own, sent = gradients
    changed = own | {"bias": torch.full_like(own["bias"], 100.0)}
    for kind in (SquaredDistance, CosineDistance):
        distance = kind(weights={"bias": 0.0})
        torch.testing.assert_close(distance(own, sent), distance(changed, sent), rtol=0, atol=0)


def test_cosine(gradients):
    own, sent = gradients
    found = CosineDistance()(own, sent)
    for trial in range(5):
        one = torch.cat([own[n][trial].flatten() for n in own])
        other = torch.cat([sent[n][0].flatten() for n in own])
        torch.testing.assert_close(found[trial], 1 - torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_mahalanobis_is_one_under_its_own_noise():
    drawn = torch.Generator().manual_seed(0)
    truth = {"weight": torch.zeros(1, 200, 100, dtype=torch.float64)}
    std = torch.rand(200, 100, generator=drawn, dtype=torch.float64) + 0.5
    sent = {"weight": truth["weight"] + std * torch.randn(200, 100, generator=drawn, dtype=torch.float64)}
    found = MahalanobisDistance(variance={"weight": std**2})(truth, sent)
    assert found.item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(
        MahalanobisDistance(variance=4.0)(truth, sent)[0], (sent["weight"] ** 2).mean() / 4, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (SquaredDistance(weights={"head": 1.0}), "`weights` name .'head'., which are no parameters"),
        (CosineDistance(weights={"bias": -1.0}), "`weights` must not be negative"),
        (SquaredDistance(weights={"bias": 0.0, "weight": 0.0}), "nothing is left to match"),
        (MahalanobisDistance(variance={"bias": 1.0}), "`variance` has no entry for 'weight'"),
        (MahalanobisDistance(variance=0.0), "must be positive and finite"),
        (MahalanobisDistance(variance={"weight": torch.ones(2), "bias": 1.0}), r"has shape \(2,\)"),
    ],
)
def test_bad_options_are_refused(distance, message):
    with pytest.raises(InputError, match=message):
        distance.check({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)})
