"""What an observation takes, converts and refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import DLG, ILRG, Observation


@pytest.fixture
def seen(convnet, cross_entropy, batch):
    x, y = batch
    function = LossGradient(convnet, cross_entropy)
    return Observation(
        loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), batch_size=4, labels=y, num_classes=10
    )


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.uint8)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype_are_kept_as_int64(seen, dtype, batch):
    narrow = replace(seen, labels=batch[1].to(dtype))
    assert narrow.labels.dtype == torch.int64
    assert narrow.matching_loss(*batch) < 1e-25


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_attack_takes_labels_of_any_integer_dtype(seen, dtype, batch):
    attack = DLG(restarts=1, evaluations=3, polish=0)
    one = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    found = attack(replace(seen, labels=batch[1].to(dtype)), generator=one[0])
    assert torch.equal(found.inputs, attack(seen, generator=one[1]).inputs)


def test_truth_values_are_classes(cross_entropy):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    function = LossGradient(model, cross_entropy)
    x, y = torch.rand(2, 3).double(), torch.tensor([True, False])
    seen = Observation(
        loss_gradient=function, sent=function(x, y.long()), input_shape=(3,), batch_size=2, labels=y, num_classes=2
    )
    assert seen.matching_loss(x, seen.labels) < 1e-25


def test_floating_point_class_indices_are_refused_with_the_way_out(seen, batch):
    with pytest.raises(InputError, match=r"got torch.float32.*labels\.long\(\)"):
        replace(seen, labels=batch[1].float())
    with pytest.raises(InputError, match=r"does not take labels of dtype torch\.float64"):
        DLG()(replace(seen, labels=batch[1].double(), num_classes=None))


def without(gradient, *names):
    return {n: g for n, g in gradient.items() if n not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 4.0}, "got 4.0; it is a whole number"),
        ({"batch_size": 3}, "3 examples, 4 labels"),
        ({"input_shape": 8}, "`input_shape` must be the shape of one example"),
        ({"input_shape": (1, 0, 8)}, "`input_shape` must be the shape of one example"),
        ({"num_classes": 0}, "`num_classes` must be a positive whole number"),
        ({"value_range": (1.0, 0.0)}, "`value_range` must be"),
        ({"value_range": (0.0, float("nan"))}, "`value_range` must be"),
        ({"value_range": 1.0}, "`value_range` must be"),
        ({"scale": 0.0}, "`scale` must be a finite number other than 0"),
        ({"scale": "half"}, "`scale` must be a finite number"),
        ({"local": 3}, "`local` must be a `LocalTraining`"),
        ({"labels": [1, 2, 3, 4]}, "`labels` must be a tensor"),
        ({"labels": torch.tensor(3)}, "`labels` must have one entry per example"),
        ({"sent": {}}, "The sent gradient is empty"),
        ({"sent": [torch.zeros(3)]}, "A gradient is a dictionary"),
        ({"sent": {"0.weight": None}}, "must be a floating-point tensor, got NoneType"),
        ({"sent": {"0.bias": torch.zeros(16, dtype=torch.int64)}}, "must be a floating-point tensor, got torch.int64"),
        ({"sent": {"0.bias": torch.full((16,), float("nan"))}}, "holds NaN"),
        ({"sent": {"0.bias": torch.zeros(3)}}, r"has shape \(3,\)"),
        ({"sent": {"elsewhere": torch.zeros(3)}}, r"unexpected \['elsewhere'\]"),
        ({"loss_gradient": nn.Linear(2, 2)}, r"must be a `LossGradient"),
    ],
)
def test_odd_observations_are_refused(seen, change, message):
    with pytest.raises(InputError, match=message):
        replace(seen, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": (3, 8, 8)}, r"Examples of shape \(4, 3, 8, 8\) do not go through"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, "Label 10 is out of range"),
        ({"labels": None, "num_classes": None}, "needs `num_classes`"),
    ],
)
def test_what_only_the_model_tells_is_refused_before_the_attack(seen, change, message, monkeypatch):
    monkeypatch.setattr(DLG, "run", None)
    with pytest.raises(InputError, match=message):
        DLG()(replace(seen, **change))


@pytest.mark.parametrize("attack", [DLG(), ILRG()])
def test_a_seed_is_no_generator(seen, attack):
    with pytest.raises(InputError, match=r"got int.*manual_seed\(7\)"):
        attack(seen, generator=7)
    with pytest.raises(InputError, match="`Observation` objects, got dict"):
        attack(seen.sent)


def test_a_known_factor_is_divided_out(seen, batch):
    ten = replace(seen, sent={n: 10 * g for n, g in seen.sent.items()}, scale=10.0)
    assert ten.matching_loss(*batch) < 1e-25
    assert (
        ILRG()(replace(ten, labels=None)).label_counts.tolist()
        == ILRG()(replace(seen, labels=None)).label_counts.tolist()
    )


@pytest.mark.parametrize("factor", [0.5, 32.0, -0.1])
def test_a_free_factor_is_the_one_that_matches_best(seen, batch, factor):
    free = replace(seen, sent={n: factor * g for n, g in seen.sent.items()}, scale=None)
    loss, scale = free.match(*batch)
    assert loss < 1e-25
    assert scale == pytest.approx(factor)


def test_the_matching_loss_is_over_what_was_sent(seen, batch):
    part = replace(seen, sent=without(seen.sent, "0.weight"))
    assert part.not_sent == ("0.weight",)
    assert part.matching_loss(*batch) < 1e-25
