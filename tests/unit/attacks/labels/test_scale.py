"""Labels from a head whose gradient was sent times a factor that the attacker does not know."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import ILRG, IDLGLabel, LabelSystem, Observation
from gradguard.attacks._labels.inference import infer_labels
from gradguard.leakage.labels import count_labels

FACTORS = (0.5, 32.0, -0.1)


def observe(model, pictures, where, factor, scale=None):
    x, y = pictures.images[where].double(), pictures.labels[where]
    function = LossGradient(model, nn.CrossEntropyLoss())
    sent = {n: factor * g for n, g in function(x, y).items()}
    seen = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), batch_size=len(x), scale=scale)
    return seen, count_labels(y, 10)


@pytest.fixture
def trained(convnet, digit_pictures):
    """Some steps, so that it is right more often than not."""
    x, y = digit_pictures.images[:256].double(), digit_pictures.labels[:256]
    optimiser = torch.optim.Adam(convnet.parameters(), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(convnet(x), y).backward()
        optimiser.step()
    return convnet


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [4, 8, 24])
def test_ilrg_counts_as_well_without_the_factor(convnet, digit_pictures, factor, size):
    seen, true = observe(convnet, digit_pictures, slice(size), factor)
    found = ILRG()(seen)
    known = ILRG()(replace(seen, scale=factor))
    assert torch.equal(known.label_counts, true)
    assert torch.equal(found.label_counts, true)
    # As exact as the method's features per class: beyond one example of a class they are their mean.
    assert found.details["scale"] == pytest.approx(factor, rel=0.15)
    assert found.converged == (size < 10)  # with 24 examples of 10 classes other counts come close
    assert known.details["scale"] == factor


@pytest.mark.parametrize("factor", FACTORS)
def test_where_the_rows_do_not_tell_the_factor_it_says_so(convnet, digit_pictures, factor):
    """All classes are there several times: other counts at another factor explain the gradient as well."""
    seen, true = observe(convnet, digit_pictures, slice(48), factor)
    found = ILRG()(seen)
    assert not found.details["scale_identified"]
    assert not found.converged
    assert torch.minimum(found.label_counts, true).sum() >= 46


@pytest.mark.parametrize("factor", FACTORS)
def test_idlg_without_the_factor(convnet, digit_pictures, factor):
    for index in range(5):
        seen, true = observe(convnet, digit_pictures, slice(index, index + 1), factor)
        found = IDLGLabel()(seen)
        assert torch.equal(found.label_counts, true)
        assert found.converged
        assert found.details["scale"] == pytest.approx(factor)
        assert torch.equal(infer_labels(seen), found.labels)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_label_system_without_the_factor(trained, digit_pictures, factor):
    """On a trained model, where iLRG alone fails: examples that are solved one by one give the factor."""
    seen, true = observe(trained, digit_pictures, slice(300, 303), factor)
    found = LabelSystem()(seen)
    known = LabelSystem()(replace(seen, scale=factor))
    assert torch.equal(known.label_counts, true)
    assert torch.equal(found.label_counts, true)
    if found.details["scale_identified"]:
        assert found.details["scale"] == pytest.approx(factor, rel=0.05)


def test_two_classes_and_an_unknown_sign_tell_nothing():
    torch.manual_seed(0)
    function = LossGradient(nn.Linear(4, 2).double(), nn.CrossEntropyLoss())
    x = torch.rand(1, 4).double()
    seen = Observation(loss_gradient=function, sent=function(x, torch.tensor([1])), input_shape=(4,), scale=None)
    with pytest.raises(InputError, match="the label cannot be told"):
        IDLGLabel()(seen)


def test_a_bias_that_was_not_sent(convnet, digit_pictures):
    seen, true = observe(convnet, digit_pictures, slice(4), 1.0, 1.0)
    seen = replace(seen, sent={n: g for n, g in seen.sent.items() if n != "5.bias"})
    with pytest.raises(InputError, match=r"'5\.bias', was not sent"):
        ILRG()(seen)
    assert torch.equal(LabelSystem()(seen).label_counts, true)
