"""Advice: every change is checked by building the changed model here and analysing it."""

import pytest
import torch
from torch import nn

from gradguard.errors import InputError
from gradguard.leakage import advice, advised, rank_analysis
from gradguard.zoo import models


def test_lenet_s_first_layer_with_fewer_filters():
    model = models.lenet()
    (found,) = (a for a in advice(model, (1, 28, 28)) if (a.layer, a.change) == ("0", "filters"))
    assert (found.before, found.after, found.checked) == (12, 3, True)
    # The same by hand: 3 filters, and 3 input channels in the layer behind.
    changed = models.lenet()
    changed[0], changed[2] = nn.Conv2d(1, 3, 5, 2, 2), nn.Conv2d(3, 12, 5, 2, 2)
    analysis = rank_analysis(changed, (1, 28, 28))
    assert (found.deficit, found.verdict, found.index) == (analysis.layers[0].deficit, analysis.verdict, analysis.index)
    assert found.deficit > found.virtual_constraints == 0
    weights = [sum(m.weight.numel() for m in net if hasattr(m, "weight")) for net in (changed, model)]
    assert found.parameters == weights[0] / weights[1]
    flops = [3 * 25 * 196 + 12 * 75 * 49 + 2 * 3600 * 49 + 5880, 300 * 196 + 3 * 3600 * 49 + 5880]
    assert found.flops == pytest.approx(flops[0] / flops[1])
    # One filter more, and the count no longer says so.
    changed[0], changed[2] = nn.Conv2d(1, 4, 5, 2, 2), nn.Conv2d(4, 12, 5, 2, 2)
    layer = rank_analysis(changed, (1, 28, 28)).layers[0]
    assert layer.rank_bound == layer.unknowns


def test_stride_changes_the_layers_behind_and_the_head():
    (found,) = advice(models.digits_convnet(), (1, 8, 8))
    assert (found.layer, found.change, found.before, found.after) == ("0", "stride", 1, 4)
    changed = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 4, 1), nn.Tanh(), nn.Conv2d(16, 32, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 10))
    )
    assert found.deficit == rank_analysis(changed, (1, 8, 8)).layers[0].deficit == 19
    assert str(found).startswith("0: stride 1 -> 4: deficit 19 (virtual 0), not recoverable")
    assert found.to_dict()["after"] == 4


def test_short_at_all_is_a_smaller_change_than_beyond_the_virtual_constraints():
    short = {(a.layer, a.change): a for a in advice(models.lenet(), (1, 28, 28), beyond_virtual=False)}
    beyond = {(a.layer, a.change): a for a in advice(models.lenet(), (1, 28, 28))}
    assert short["2", "kernel"].after == 3 > beyond["2", "kernel"].after == 1
    assert 0 < short["2", "kernel"].deficit <= short["2", "kernel"].virtual_constraints
    assert beyond["2", "kernel"].deficit > beyond["2", "kernel"].virtual_constraints


def test_nested_models_with_normalisation_are_rebuilt_too():
    block = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(512, 4))
    found = advice(model, (1, 8, 8))
    assert found[0].layer == "0.0"
    assert found[0].checked


def test_what_cannot_be_rebuilt_is_advised_by_the_count():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 9, 3, padding=1), nn.Linear(324, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.conv(x)).flatten(1))

    (found,) = advice(Own(), (4, 6, 6))
    assert (found.layer, found.change, found.before, found.after) == ("conv", "filters", 9, 2)
    assert not found.checked
    assert "by the count alone" in str(found)


def test_fully_connected_models_have_no_advice():
    assert advice(models.fcn((64, 20, 2)), (1, 8, 8)) == ()


def test_the_model_and_the_global_generator_are_left_alone():
    model = models.digits_convnet()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    advice(model, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_no_attack_gets_around_comes_first():
    verdicts = [a.verdict for a in advice(models.lenet(), (1, 28, 28), limit=6)]
    assert verdicts == ["not recoverable"] * 2 + ["optimisation only"] * 4
    (first, *_) = advice(models.digits_convnet(), (1, 8, 8), beyond_virtual=False)
    assert first.verdict == "not recoverable"


def test_advised_is_the_changed_model_with_weights_of_its_own():
    model = models.digits_convnet().train()
    (change,) = advice(model, (1, 8, 8))
    torch.manual_seed(0)
    changed = advised(model, (1, 8, 8), change)
    assert changed.training
    assert changed[0].stride == (4, 4)
    assert changed(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    analysis = rank_analysis(changed, (1, 8, 8))
    assert (analysis.verdict, analysis.index) == (change.verdict, change.index)
    torch.manual_seed(0)
    again = advised(model, (1, 8, 8), change)
    torch.manual_seed(1)
    other = advised(model, (1, 8, 8), change)
    assert torch.equal(changed[0].weight, again[0].weight)
    assert not torch.equal(changed[0].weight, other[0].weight)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(InputError, match="cannot be rebuilt with '0' changed"):
        advised(Own(), (1, 8, 8), change)


def test_options():
    with pytest.raises(InputError, match="`limit` must be at least 1"):
        advice(models.digits_convnet(), (1, 8, 8), limit=0)
