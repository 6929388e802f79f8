"""Transforms: what is sent, and what is declared of it."""

import pytest
import torch

from gradguard import InputError, InputJacobian, LossGradient
from gradguard.defenses import (
    Compose,
    GaussianNoise,
    Pruning,
    Quantisation,
    RandomPruning,
    Release,
    Sign,
    Soteria,
    TopK,
)
from gradguard.threats.knowledge import InOtherUnits


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def gradient():
    return {
        "weight": torch.randn(20, 30, generator=gen(1), dtype=torch.float64),
        "bias": torch.randn(7, generator=gen(2), dtype=torch.float64),
        "dead": torch.zeros(5, dtype=torch.float64),
    }


def known(defense, gradient, seed=0):
    message = defense(gradient, generator=gen(seed))
    return message, defense.knowledge(Release(gradient), message)


def test_top_k_is_pruning_and_declares_its_mask(gradient):
    assert TopK is Pruning
    message, knowledge = known(Pruning(fraction=0.4), gradient)
    flat = torch.cat([g.flatten() for g in gradient.values()])
    kept = torch.cat([m.flatten() for m in knowledge.mask.values()])
    assert (~kept).sum() == int(0.4 * flat.numel())
    assert flat[~kept].abs().max() <= flat[kept].abs().min()
    assert all(torch.equal(message[n], g * knowledge.mask[n]) for n, g in gradient.items())
    assert not knowledge.noisy


def test_random_pruning_drops_its_share_and_shows_which(gradient):
    dense = {n: g + 1 for n, g in gradient.items()}
    message, knowledge = known(RandomPruning(fraction=0.3), dense)
    total = sum(g.numel() for g in dense.values())
    assert sum(int((m == 0).sum()) for m in message.values()) == int(0.3 * total)
    assert all(torch.equal(message[n] != 0, m) for n, m in knowledge.mask.items())
    other, _ = known(RandomPruning(fraction=0.3), dense, seed=1)
    assert not torch.equal(other["weight"], message["weight"])


def test_signs(gradient):
    message, knowledge = known(Sign(), gradient)
    assert all(torch.equal(message[n], g.sign()) for n, g in gradient.items())
    (step,) = knowledge.transforms
    nearest = step.nearest(gradient, message)
    assert all(torch.equal(nearest[n], g) for n, g in gradient.items())
    wrong = {n: -g for n, g in gradient.items()}
    assert not any(g.any() for g in step.nearest(wrong, message).values())
    scaled = Sign(scaled=True)(gradient)
    torch.testing.assert_close(scaled["weight"], gradient["weight"].sign() * gradient["weight"].abs().mean())


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_quantisation_has_that_many_levels_and_is_within_half_a_step(gradient, bits):
    message, knowledge = known(Quantisation(bits=bits), gradient)
    assert len(message["weight"].unique()) <= 2**bits
    step = 2 * gradient["weight"].abs().max() / (2**bits - 1)
    assert (message["weight"] - gradient["weight"]).abs().max() <= step / 2 * (1 + 1e-9)
    (rounding,) = knowledge.transforms
    torch.testing.assert_close(rounding(gradient), message)
    torch.testing.assert_close(rounding.nearest(gradient, message), gradient)  # the truth is among those that fit
    far = {n: g + 10 for n, g in gradient.items()}
    torch.testing.assert_close(rounding.nearest(far, message)["weight"], message["weight"] + step / 2)


def test_random_rounding_is_unbiased_and_declared_as_noise(gradient):
    draws = [known(Quantisation(bits=2, stochastic=True), gradient, seed=s)[0]["weight"] for s in range(200)]
    error = torch.stack(draws) - gradient["weight"]
    step = 2 * gradient["weight"].abs().max() / 3
    assert error.mean(0).abs().max() < 5 * step / 2 / 200**0.5
    _, knowledge = known(Quantisation(bits=2, stochastic=True), gradient)
    assert 0.5 < knowledge.variance["weight"] / error.square().mean() < 2


def test_steps_in_other_units(gradient):
    message, knowledge = known(Quantisation(bits=3), gradient)
    other = knowledge.scaled(-4.0).transforms[0]
    assert isinstance(other, InOtherUnits)
    assert other.name == "quantisation"
    moved = {n: -4.0 * g for n, g in gradient.items()}
    torch.testing.assert_close(other(moved), {n: -4.0 * m for n, m in message.items()})
    torch.testing.assert_close(other.nearest(moved, {n: -4.0 * m for n, m in message.items()}), moved)


def test_a_protector_sends_the_message_itself_and_its_declaration(gradient):
    single = {n: g.float() for n, g in gradient.items()}
    sent = Sign().start().protect(Release(single))
    assert all(torch.equal(m, single[n].sign()) for n, m in sent.message.items())
    assert [t.name for t in sent.knowledge.transforms] == ["sign"]
    both = Compose(steps=(Pruning(fraction=0.5), Quantisation(bits=4))).start().protect(Release(single))
    assert both.knowledge.mask is not None
    assert [t.name for t in both.knowledge.transforms] == ["quantisation"]
    noisy = Compose(steps=(GaussianNoise(std=0.1), Sign())).start().protect(Release(single))
    assert noisy.knowledge.noisy


def test_soteria_drops_the_features_that_move_least_for_their_size(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    jacobian, gradient = InputJacobian(function, *batch), function(*batch)
    defense = Soteria(fraction=0.25)
    message = defense(gradient, jacobian)
    body = convnet[:-1]
    slopes = torch.func.vmap(torch.func.jacrev(lambda x: body(x[None])[0]))(batch[0]).flatten(2).norm(dim=-1)
    ratio = (slopes / body(batch[0]).detach().abs()).sum(0)
    dropped = (message["5.weight"] == 0).all(0)
    assert dropped.sum() == 128
    assert ratio[dropped].max() <= ratio[~dropped].min()
    assert all(torch.equal(message[n], g) for n, g in gradient.items() if n != "5.weight")
    known = defense.knowledge(Release(gradient, loss_gradient=function, inputs=batch[0], targets=batch[1]), message)
    assert torch.equal(known.mask["5.weight"], ~dropped.expand(10, -1))
    with pytest.raises(InputError, match="named_modules"):
        Soteria(layer="nowhere")(gradient, jacobian)


def test_options_are_checked():
    for make in (
        lambda: RandomPruning(fraction=0.0),
        lambda: Pruning(fraction=1.0),
        lambda: Quantisation(bits=0),
        lambda: Quantisation(bits=2.5),
        lambda: Quantisation(bits=True),
    ):
        with pytest.raises(InputError):
            make()
