"""Labels of trained models: possible classes, examples solved one by one, the whole; with and without a bias."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import ILRG, LabelSystem
from gradguard.attacks._labels.counts import restore_label_counts, sparsified
from gradguard.attacks._labels.space import class_violations, head_space, possible_classes
from gradguard.attacks._labels.system import accepted, explain, single_examples, solve_label_system
from gradguard.leakage.labels import count_labels, label_recovery
from gradguard.threats.observation import Observation
from gradguard.zoo.models import fcn
from gradguard.zoo.pictures import digits


def confident(batch=8, classes=40, width=20, seed=0, nonnegative=False, repeat=False):
    """A head whose scores are large, as a trained one's: float64 weight, bias, features, labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    features = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    features = features.relu() if nonnegative else features
    labels = torch.randint(classes, (batch,), generator=generator)
    if repeat:
        features[1], labels[1] = features[0], labels[0]
    return weight, bias, features, labels


def gradients(weight, bias, features, labels):
    """The definition: autograd of the mean cross-entropy of a linear head."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(F.linear(features, weight, bias), labels), (weight, bias))


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_space_holds_every_example(with_bias):
    weight, bias, features, labels = confident()
    w, b = gradients(weight, bias, features, labels)
    space = head_space(w, b if with_bias else None, weight, bias, 8)
    assert space.rank == 8
    d = F.linear(features, weight, bias).softmax(1) - F.one_hot(labels, 40)
    torch.testing.assert_close(d @ space.left @ space.left.T, d)
    e = torch.cat([features, torch.ones(8, 1)], 1) if with_bias else features
    torch.testing.assert_close(e @ space.right @ space.right.T, e)
    scores = (e @ space.right) @ space.scores.T + space.offset
    torch.testing.assert_close(scores, F.linear(features, weight, bias))


@pytest.mark.parametrize("seed", range(3))
def test_present_classes_are_possible_and_most_others_are_not(seed):
    weight, bias, features, labels = confident(seed=seed)
    space = head_space(*gradients(weight, bias, features, labels), weight, bias, 8)
    violations = class_violations(space.left)
    present = count_labels(labels, 40) > 0
    assert violations[present].max() < 1e-8
    assert (violations[~present] > 1e-3).double().mean() > 0.9
    assert possible_classes(space)[present].all()


@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_truth_solves_the_single_problems_and_checks_itself(nonnegative):
    weight, bias, features, labels = confident(nonnegative=nonnegative)
    space = head_space(*gradients(weight, bias, features, labels), weight, bias, 8)
    start = torch.cat([features, torch.ones(8, 1)], 1) @ space.right
    found = single_examples(space, labels, start, 8, nonnegative=nonnegative, iterations=0)
    assert found.residuals.max() < 1e-10
    torch.testing.assert_close(found.copies, torch.ones(8, dtype=torch.float64))
    assert sorted(accepted(found, space, 8).tolist()) == list(range(8))
    zeros = (features == 0).sum(1) if nonnegative else torch.zeros_like(labels)
    assert torch.equal(found.equations, 40 - 8 + zeros)
    # Near it, it is found again.
    draw = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    again = single_examples(space, labels, start + 0.05 * draw, 8, nonnegative=nonnegative)
    torch.testing.assert_close(again.features, start, atol=1e-6, rtol=1e-6)


def test_a_class_that_is_absent_has_no_solution():
    weight, bias, features, labels = confident()
    space = head_space(*gradients(weight, bias, features, labels), weight, bias, 8)
    absent = torch.nonzero(count_labels(labels, 40) == 0)[:, 0]
    draw = torch.randn(len(absent), space.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert single_examples(space, absent, draw, 8).residuals.min() > 1e-3


def test_subtracting_examples_leaves_the_gradient_of_the_rest():
    weight, bias, features, labels = confident()
    space = head_space(*gradients(weight, bias, features, labels), weight, bias, 8)
    start = torch.cat([features, torch.ones(8, 1)], 1) @ space.right
    found = single_examples(space, labels, start, 8, iterations=0)
    rest = space.without(found.directions[:3], found.features[:3])
    assert rest.rank == 5
    w, b = gradients(weight, bias, features[3:], labels[3:])
    torch.testing.assert_close(rest.matrix * 8 / 5, torch.cat([w, b[:, None]], 1))
    torch.testing.assert_close(rest.scores, torch.cat([weight, bias[:, None]], 1) @ rest.right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["bias", "no bias", "known bias", "nonnegative", "copies"])
def test_all_labels_of_a_confident_head(case, dtype):
    nonnegative = case == "nonnegative"
    for seed in range(3):
        weight, bias, features, labels = confident(seed=seed, nonnegative=nonnegative, repeat=case == "copies")
        if case == "no bias":
            bias = torch.zeros_like(bias)
        w, b = (g.to(dtype) for g in gradients(weight, bias, features, labels))
        sent_bias = None if case in ("no bias", "known bias") else b
        known = None if case == "no bias" else bias
        found = solve_label_system(w, sent_bias, weight, known, 8, nonnegative=nonnegative)
        assert torch.equal(found.counts, count_labels(labels, 40))
        assert found.guessed == 0
        assert found.examples + found.classes == 8


def test_examples_are_counted_with_their_copies():
    weight, bias, features, labels = confident(repeat=True)
    space = head_space(*gradients(weight, bias, features, labels), weight, bias, 8)
    assert space.rank == 7
    found = explain(space, 8, torch.Generator().manual_seed(0))
    assert found.examples[labels[0]] >= 2


def test_where_rank_leaves_no_room_ilrg_answers():
    weight, bias, features, labels = confident(batch=30, classes=6)
    w, b = gradients(weight, bias, features, labels)
    found = solve_label_system(w, b, weight, bias, 30)
    assert torch.equal(found.counts, restore_label_counts(w, b, weight, bias, 30).counts)
    assert (found.examples, found.classes, found.guessed) == (0, 0, 30)


# ---------------------------------------------------------------------- as an attack, on real pictures


@pytest.fixture(scope="module")
def trained():
    """A network on the digits, trained until it is confident."""
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fcn((64, 100, 100, 10), activation="relu", bias=True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(data.images[:1000]), data.labels[:1000]).backward()
        optimiser.step()
    # In double precision: well-told digits leave gradients below the rounding of float32.
    return model.double(), replace(data, images=data.images.double())


def observe(model, inputs, labels):
    function = LossGradient(model, nn.CrossEntropyLoss())
    sent = function(inputs, labels)
    return Observation(loss_gradient=function, sent=sent, input_shape=tuple(inputs.shape[1:]), batch_size=len(inputs))


def test_it_beats_ilrg_on_a_trained_network(trained):
    model, data = trained
    generator = torch.Generator().manual_seed(0)
    scores = {"ILRG": 0.0, "LabelSystem": 0.0}
    for _ in range(8):
        chosen = 1000 + torch.randperm(len(data) - 1000, generator=generator)[:5]
        observation = observe(model, data.images[chosen], data.labels[chosen])
        for attack in (ILRG(refinements=0), LabelSystem()):
            counts = attack(observation).label_counts
            scores[attack.name] += label_recovery(counts, count_labels(data.labels[chosen], 10)).i_rec / 8
    assert scores["LabelSystem"] > 1 - 0.5 * (1 - scores["ILRG"])


def test_on_an_untrained_network_it_is_ilrg(trained):
    _, data = trained
    model = fcn((64, 100, 100, 10), activation="relu", bias=True)
    observation = observe(model.double(), data.images[:24], data.labels[:24])
    result = LabelSystem()(observation)
    assert torch.equal(result.label_counts, ILRG()(observation).label_counts)
    assert result.details["examples"] == 0


@pytest.mark.parametrize("bias", ["none", "frozen"])
def test_a_head_without_a_sent_bias_works(bias):
    weight, known, features, labels = (t.float() if t.is_floating_point() else t for t in confident())
    model = nn.Sequential(nn.Linear(20, 40, bias=bias == "frozen"))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    if bias == "frozen":
        with torch.no_grad():
            model[0].bias.copy_(known)
        model[0].bias.requires_grad_(False)
    result = LabelSystem()(observe(model, features, labels))
    assert torch.equal(result.label_counts, count_labels(labels, 40))
    assert result.converged


def test_the_same_generator_gives_the_same(trained):
    model, data = trained
    observation = observe(model, data.images[1000:1006], data.labels[1000:1006])
    one, two = (LabelSystem()(observation, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.label_counts, two.label_counts)
    assert one.details == two.details


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="`trust` must not be negative, got -1"):
        LabelSystem(trust=-1)
    with pytest.raises(InputError, match="`rounds` must not be negative, got -1"):
        LabelSystem(rounds=-1)


def test_a_sparsified_gradient_is_told_from_dead_features():
    weight, bias, features, labels = confident(nonnegative=True)
    features[:, :7] = 0  # features that are off for the whole batch
    gradient, _ = gradients(weight, bias, features, labels)
    assert not sparsified(gradient)
    smallest = gradient.abs().flatten().argsort()[: 7 * 40 + gradient.numel() // 10]
    gradient.view(-1)[smallest] = 0
    assert sparsified(gradient)


def test_ilrg_answers_for_a_sparsified_gradient():
    torch.manual_seed(0)
    model = fcn((64, 100, 10), activation="relu", bias=True).double()
    pictures = digits()
    x, y = pictures.images[:6].double().flatten(1), pictures.labels[:6]
    function = LossGradient(model, nn.CrossEntropyLoss())
    sent = function(x, y)
    for gradient in sent.values():
        gradient.view(-1)[gradient.abs().flatten().argsort()[: gradient.numel() // 3]] = 0
    seen = Observation(loss_gradient=function, sent=sent, input_shape=(64,), batch_size=6)
    found = LabelSystem(trust=0.0)(seen)
    assert found.details["sparsified"]
    assert not found.converged
    assert torch.equal(found.label_counts, ILRG()(seen).label_counts)
