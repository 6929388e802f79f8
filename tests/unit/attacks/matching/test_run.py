"""A matching attack under way: many pictures at once, labels as variables, files to go on from, budgets, bad luck."""

import stat
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputError, LossGradient
from gradguard.attacks import (
    DLG,
    RGAP,
    GradientMatching,
    InvertingGradients,
    LevenbergMarquardt,
    Observation,
    attack_candidates,
)
from gradguard.attacks._matching import run as matching_run
from gradguard.attacks._matching.adam import Adam
from gradguard.attacks._matching.distances import CosineDistance
from gradguard.attacks._matching.lbfgs import LBFGSSearch
from gradguard.functional.local_training import LocalTraining, surrogate_model
from gradguard.functional.vectors import flatten
from references import flat_gradient, loss_of, psnr


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(model, loss_fn, x, y, **given):
    function = LossGradient(model, loss_fn)
    given = {"labels": y, "num_classes": 10} | given
    return Observation(
        loss_gradient=function, sent=function(x, y), input_shape=tuple(x.shape[1:]), batch_size=len(x), **given
    )


@pytest.fixture
def observations(convnet, cross_entropy, batch):
    """Three pictures under one model."""
    return [observe(convnet, cross_entropy, batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(3)]


# ---------------------------------------------------------------------- several pictures


@pytest.mark.parametrize("attack", [DLG(restarts=2, evaluations=25, polish=2), InvertingGradients(iterations=30)])
def test_pictures_attacked_together_come_out_as_alone(observations, attack):
    together = attack.attack_all(observations, generator=gen())
    drawn = gen()
    for seen, found in zip(observations, together, strict=True):
        alone = attack(seen, generator=drawn)
        torch.testing.assert_close(found.inputs, alone.inputs, rtol=1e-4, atol=1e-5)
        assert found.details["trial"] == alone.details["trial"]
        assert found.matching_loss == pytest.approx(alone.matching_loss, rel=1e-3)


def test_found_pictures_leave_the_batch(observations, batch):
    found = DLG(restarts=3)(observations[0], generator=gen())
    several = DLG(restarts=3).attack_all(observations, generator=gen())
    assert found.details["stopped"] == several[0].details["stopped"] == "matched"
    for result, picture in zip(several, batch[0], strict=False):
        assert psnr(result.inputs, picture[None]) > 100


@pytest.mark.parametrize("evaluations", [25, 30])
def test_trials_wait_for_others_to_end(observations, evaluations):
    attack = DLG(restarts=3, evaluations=evaluations, polish=0, at_once=9)
    expected = attack.attack_all(observations, generator=gen())
    found = replace(attack, at_once=2).attack_all(observations, generator=gen())
    for one, other in zip(found, expected, strict=True):
        assert one.details["evaluations"] == evaluations
        assert one.details["trial_losses"] == pytest.approx(other.details["trial_losses"], rel=1e-3)
        torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-4, atol=1e-5)


def test_what_waits_for_a_found_picture_does_not_begin(observations, batch):
    found = DLG(restarts=6, at_once=3).attack_all(observations, generator=gen())
    for result, picture in zip(found, batch[0], strict=False):
        assert result.details["stopped"] == "matched"
        assert psnr(result.inputs, picture[None]) > 100
        # As many as pictures begin, and those that the first to end made room for.
        begun = torch.isfinite(torch.tensor(result.details["trial_losses"]))
        assert begun[0]
        assert not begun.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_range": None}, "observation 1 has `value_range=None`"),
        ({"labels": None}, "Give the labels of all observations"),
    ],
)
def test_observations_of_different_kinds_are_refused(observations, change, message):
    with pytest.raises(InputError, match=message):
        DLG().attack_all([observations[0], replace(observations[1], **change)])


def test_nothing_to_attack(observations):
    with pytest.raises(InputError, match="no observation"):
        DLG().attack_all([])


# ---------------------------------------------------------------------- labels as variables


@pytest.mark.parametrize("mode", ["joint", "shared"])
def test_derivatives_by_label_logits(convnet, cross_entropy, batch, mode):
    x, y = batch[0][:2], batch[1][:2]
    seen = observe(convnet, cross_entropy, x, y, labels=None)
    problem = DLG(restarts=3, labels=mode).trials([seen])
    points = torch.randn(3, 128 + (20 if mode == "joint" else 10), generator=gen(), dtype=torch.float64)
    values, gradients = problem.value_and_gradient(points, torch.arange(3))
    sent = flatten(seen.sent)
    for trial in range(3):
        inputs = points[trial, :128].reshape(2, 1, 8, 8).clone().requires_grad_(True)
        logits = points[trial, 128:].clone().requires_grad_(True)
        targets = logits.reshape(2, 10).softmax(-1) if mode == "joint" else logits.softmax(-1).expand(2, 10)
        loss, parameters = loss_of(convnet, cross_entropy, inputs, targets)
        own = torch.autograd.grad(loss, parameters, create_graph=True)
        value = (torch.cat([g.flatten() for g in own]) - sent).square().sum() / sent.square().sum()
        expected = torch.autograd.grad(value, [inputs, logits])
        torch.testing.assert_close(values[trial], value.detach(), rtol=1e-10, atol=0)
        expected = torch.cat([part.flatten() for part in expected])
        torch.testing.assert_close(gradients[trial], expected, rtol=1e-8, atol=1e-12)


def test_joint_labels_are_found_with_the_picture(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    found = DLG(restarts=4)(observe(convnet, cross_entropy, x, y, labels=None), generator=gen(1))
    assert found.labels.tolist() == y.tolist()
    assert psnr(found.inputs, x) > 60


# ---------------------------------------------------------------------- files


class StoppedError(Exception):
    """The process is killed."""


def stop_after(monkeypatch, saves):
    """Write at every look, and die after `saves` of them."""
    count = 0
    save = matching_run.MatchingRun.save

    def saved(self):
        nonlocal count
        save(self)
        count += 1
        if count == saves:
            raise StoppedError

    monkeypatch.setattr(matching_run, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(matching_run.MatchingRun, "save", saved)


@pytest.mark.parametrize(
    "attack",
    [
        DLG(restarts=3, evaluations=60, polish=0),
        DLG(restarts=3, evaluations=25, polish=0, at_once=2),
        InvertingGradients(restarts=3, iterations=60),
    ],
    ids=repr,
)
def test_an_interrupted_attack_ends_as_it_would_have(tmp_path, monkeypatch, observations, attack):
    expected = attack.attack_all(observations, generator=gen())
    path = tmp_path / "attack.safetensors"
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(StoppedError):
            attack.attack_all(observations, generator=gen(), checkpoint=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = attack.attack_all(observations, generator=gen(), checkpoint=path)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert one.details == other.details
    assert not path.exists()


def test_an_interrupted_polish_does_not_search_again(tmp_path, monkeypatch, observations):
    attack, path = DLG(restarts=2, evaluations=12, polish=3), tmp_path / "attack.safetensors"
    expected = attack.attack_all(observations, generator=gen())

    def killed(*args, **kwargs):
        raise StoppedError

    with monkeypatch.context() as context:
        context.setattr("gradguard.attacks._matching.engine.levenberg_marquardt", killed)
        with pytest.raises(StoppedError):
            attack.attack_all(observations, generator=gen(), checkpoint=path)
    monkeypatch.setattr(LBFGSSearch, "advance", killed)
    found = attack.attack_all(observations, generator=gen(), checkpoint=path)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert one.details == other.details


def test_a_checkpoint_of_another_attack_is_refused(tmp_path, monkeypatch, observations):
    path = tmp_path / "attack.safetensors"
    with monkeypatch.context() as context:
        stop_after(context, 1)
        with pytest.raises(StoppedError):
            DLG(restarts=2)(observations[0], generator=gen(), checkpoint=path)
    for attack, seen in ((DLG(restarts=3), observations[0]), (DLG(restarts=2), observations[1])):
        with pytest.raises(InputError, match="was written by another attack, or on another gradient"):
            attack(seen, checkpoint=path)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="is no checkpoint"):
        DLG(restarts=2)(observations[0], checkpoint=path)
    with pytest.raises(InputError, match="is a folder"):
        DLG(restarts=2)(observations[0], checkpoint=tmp_path)


# ---------------------------------------------------------------------- budgets


def test_wall_clock_is_a_budget(observations):
    attack = InvertingGradients(iterations=10**6, max_seconds=0.5)
    found = attack(observations[0], generator=gen())
    assert found.details["stopped"] == "time"
    assert 0 < found.details["evaluations"] < 10**5
    assert torch.isfinite(found.inputs).all()


def test_progress_shows_the_best_value(observations, capsys):
    InvertingGradients(iterations=30)(observations[0], generator=gen(), progress=True)
    shown = capsys.readouterr().out
    assert "InvertingGradients" in shown
    assert "30/30" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 0.0}, "`max_seconds` must be positive or None, got 0.0"),
        ({"at_once": 0}, "`at_once` must be positive or None, got 0"),
        ({"chunk_size": -1}, "`chunk_size` must be positive or None, got -1"),
        ({"start_from": "black"}, '`start_from` must be "normal", "uniform" or "grey"'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        DLG(**options)


def test_chunks_change_nothing(observations):
    attack = DLG(restarts=4, evaluations=15, polish=0)
    expected = attack.attack_all(observations, generator=gen())
    found = replace(attack, chunk_size=5).attack_all(observations, generator=gen())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- bad luck


@dataclass(frozen=True, kw_only=True)
class SomeStartsAreBroken(DLG):
    """The first draw of several trials starts one where nothing is defined; a single one starts well."""

    def start(self, shape, observation, generator):
        start = super().start(shape, observation, generator)
        if len(start) > 1:
            start[1] = float("nan")
        return start


def test_trials_that_meet_nothing_finite_start_anew_and_are_counted(observations, batch):
    found = SomeStartsAreBroken(restarts=3, evaluations=40, polish=0)(observations[0], generator=gen())
    assert found.details["restarted"] == 1
    assert torch.isfinite(torch.tensor(found.details["trial_losses"])).all()
    again = SomeStartsAreBroken(restarts=3, evaluations=40, polish=0)(observations[0], generator=gen())
    assert torch.equal(found.inputs, again.inputs)


# ---------------------------------------------------------------------- free parts


def test_starts(observations):
    shape = (4, 1, 1, 8, 8)
    grey = DLG(start_from="grey").start(shape, observations[0], gen())
    uniform = DLG(start_from="uniform").start(shape, observations[0], gen())
    assert (grey == 0.5).all()
    assert 0 <= uniform.min() < 0.1
    assert 0.9 < uniform.max() <= 1


def test_every_part_can_be_chosen(observations, batch):
    attack = GradientMatching(
        objective=CosineDistance(),
        minimiser=Adam(iterations=300, sign="soft", decay="cosine"),
        boxed=True,
        start_from="grey",
        restarts=1,
    )
    found = attack(observations[0], generator=gen())
    assert psnr(found.inputs, batch[0][:1]) > 20


def test_a_box_needs_an_optimiser_that_keeps_it(observations):
    with pytest.raises(InputError, match="L-BFGS moves freely: use Adam"):
        DLG(boxed=True)(observations[0])


# ---------------------------------------------------------------------- local training


def plain_local_training(model, x, y, steps, rate, size):
    """The mean gradient of `steps` of SGD, with PyTorch's own optimiser."""
    import copy

    client = copy.deepcopy(model)
    optimiser = torch.optim.SGD(client.parameters(), lr=rate)
    for step in range(steps):
        part = slice((step * size) % len(x), (step * size) % len(x) + size)
        optimiser.zero_grad()
        F.cross_entropy(client(x[part]), y[part]).backward()
        optimiser.step()
    pairs = zip(model.named_parameters(), client.parameters(), strict=True)
    return {n: (before - after).detach() / (rate * steps) for (n, before), after in pairs}


@pytest.mark.parametrize(("steps", "size"), [(1, 4), (3, 4), (5, 2)])
def test_a_clients_update(convnet, cross_entropy, batch, steps, size):
    x, y = batch[0][:4], batch[1][:4]
    local = LocalTraining(steps=steps, learning_rate=0.1, batch_size=size)
    found = local.mean_gradient(LossGradient(convnet, cross_entropy), x, y)
    expected = plain_local_training(convnet, x, y, steps, 0.1, size)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    if steps == 1:
        torch.testing.assert_close(flatten(found), flat_gradient(convnet, cross_entropy, x, y))


def test_an_attack_goes_through_the_steps(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function, local = LossGradient(convnet, cross_entropy), LocalTraining(steps=3, learning_rate=0.5)
    sent = local.mean_gradient(function, x, y)
    seen = Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, local=local)
    attack = DLG(restarts=1, evaluations=200, polish=0)
    knowing = attack(seen, generator=gen())
    unaware = attack(replace(seen, local=None), generator=gen())
    assert psnr(knowing.inputs, x) > 50
    assert psnr(unaware.inputs, x) < psnr(knowing.inputs, x) - 15
    with pytest.raises(InputError, match="polish needs the gradient of a single step"):
        DLG()(seen)


def test_other_attacks_refuse_local_steps(convnet, cross_entropy, batch):

    seen = observe(convnet, cross_entropy, batch[0][:1], batch[1][:1])
    with pytest.raises(InputError, match="RGAP attacks a single gradient, and this client took 3 local steps"):
        RGAP()(replace(seen, local=LocalTraining(steps=3, learning_rate=0.1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "learning_rate": 0.1}, "`steps` must be at least 1"),
        ({"steps": 1, "learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"steps": 1, "learning_rate": 0.1, "batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_local_training_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        LocalTraining(**options)


def test_models_the_layers_do_not_make_up(cross_entropy, batch):
    """Without the fast path (a functional weight) the same objective comes from `torch.func`."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 64, generator=gen()).double())

        def forward(self, x):
            return F.linear(x.flatten(1).tanh(), self.weight)

    x, y = batch[0][:1], batch[1][:1]
    found = DLG(restarts=2)(observe(Functional(), cross_entropy, x, y), generator=gen())
    assert psnr(found.inputs, x) > 100


def test_an_unknown_learning_rate_is_the_one_that_explains_the_update(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    update = {
        n: 0.5 * 3 * g for n, g in LocalTraining(steps=3, learning_rate=0.5).mean_gradient(function, x, y).items()
    }
    candidates = []
    for rate in (0.1, 0.5, 2.0):
        local = LocalTraining(steps=3, learning_rate=rate)
        sent = {n: u / (rate * 3) for n, u in update.items()}
        candidates.append(Observation(loss_gradient=function, sent=sent, input_shape=(1, 8, 8), labels=y, local=local))
    found, which = attack_candidates(DLG(restarts=1, evaluations=150, polish=0), candidates, generator=gen())
    assert which == 1
    assert psnr(found.inputs, x) > 50
    with pytest.raises(InputError, match="no candidate"):
        attack_candidates(DLG(), [])


def test_a_surrogate_between_the_ends_stands_for_many_steps(convnet, cross_entropy, batch):
    x, y = batch[0][:1], batch[1][:1]
    function = LossGradient(convnet, cross_entropy)
    local = LocalTraining(steps=20, learning_rate=0.005)
    sent = local.mean_gradient(function, x, y)
    before = function.parameters()
    after = {n: p - 20 * 0.005 * sent[n] for n, p in before.items()}
    losses = {}
    for share in (0.0, 0.5, 1.0):
        between = LossGradient(surrogate_model(convnet, before, after, share=share), cross_entropy)
        own = between(x, y)
        gap = torch.cat([(own[n] - sent[n]).flatten() for n in own]).norm()
        losses[share] = gap / torch.cat([g.flatten() for g in sent.values()]).norm()
    assert losses[0.5] < 0.5 * min(losses[0.0], losses[1.0])
    with pytest.raises(InputError, match="`share` must be in"):
        surrogate_model(convnet, before, after, share=2.0)


# ---------------------------------------------------------------------- second order from the start


def test_second_order_steps_from_random_starts(observations, batch):
    results = LevenbergMarquardt(restarts=2).attack_all(observations, generator=gen())
    for found, picture in zip(results, batch[0], strict=False):
        assert found.converged
        assert psnr(found.inputs, picture[None]) > 200
    with pytest.raises(InputError, match="`iterations` must be at least 1"):
        LevenbergMarquardt(iterations=0)
    with pytest.raises(InputError, match="leave `polish` out"):
        LevenbergMarquardt(polish=3)
