"""The frame of the defenses: laws, strengths, several steps, and protectors that can take a message back."""

from __future__ import annotations

import pytest
import torch

import gradguard as gg
from gradguard.defenses import (
    Compose,
    Defense,
    Floor,
    GaussianNoise,
    Noise,
    NoiseMultiplier,
    PriorNoise,
    Pruning,
    Ratio,
    Release,
    SmallEigenspaceNoise,
    Std,
)
from gradguard.defenses.laws import Isotropic, PriorAware, PriorDirections, SmallEigenspace
from gradguard.errors import InputError
from gradguard.leakage import bayes_floor
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.testing import check_defense
from gradguard.testing.settings import batch, dense

KEY = b"k" * 32


def release():
    function, inputs, targets = batch(dense)
    return Release(loss_gradient=function, inputs=inputs, targets=targets)


def size(gradient):
    return sum(g.square().sum() for g in gradient.values()).sqrt().item()


def noise_of(sent, of):
    return {n: sent.message[n] - g for n, g in of.gradient.items()}


LAWS = (Isotropic(), PriorAware(), PriorDirections(), SmallEigenspace())


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_noise_keeps_the_contract(law):
    check_defense(Noise(law=law))


def test_steps_keep_the_contract():
    check_defense(Compose(steps=(Pruning(fraction=0.5), Noise())))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_no_strength_is_the_identity(law):
    given = release()
    sent = Noise(law=law, strength=Std(value=0.0)).start(KEY, run=b"").protect(given)
    assert all(torch.equal(sent.message[n], g) for n, g in given.gradient.items())


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_budgets_are_met_within_a_percent_in_the_mean(law):
    given = release()
    protector = Noise(law=law, strength=Std(value=0.02)).start(KEY, run=b"")
    sizes = torch.tensor([size(noise_of(protector.protect(given), given)) ** 2 for _ in range(200)])
    mean = (sizes.mean() / given.size).sqrt().item()
    # 200 draws of some 500 elements: the standard error of the mean is 0.2%.
    assert mean == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_noise_has_no_bias(law):
    given = release()
    protector = Noise(law=law, strength=Ratio(value=1.0)).start(KEY, run=b"")
    count = 400
    noises = [noise_of(protector.protect(given), given) for _ in range(count)]
    mean = size({n: torch.stack([noise[n] for noise in noises]).mean(0) for n in given.gradient})
    # The mean of independent noises of norm |g| has norm |g| / sqrt(count); a bias would leave more.
    assert mean == pytest.approx(given.norm / count**0.5, rel=0.6)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        (GaussianNoise(noise_ratio=0.3), Noise(strength=Ratio(value=0.3))),
        (GaussianNoise(std=0.3), Noise(strength=Std(value=0.3))),
        (PriorNoise(noise_ratio=0.3), Noise(law=PriorDirections(), strength=Ratio(value=0.3))),
        (SmallEigenspaceNoise(noise_ratio=0.3), Noise(law=SmallEigenspace(), strength=Ratio(value=0.3))),
    ],
    ids=lambda value: value.name,
)
def test_a_recipe_is_its_parts(recipe, parts):
    given = release()
    one, other = (defense.start(KEY, run=b"").protect(given) for defense in (recipe, parts))
    assert all(torch.equal(one.message[n], other.message[n]) for n in given.gradient)


def test_a_displacement_is_declared_with_its_covariance():
    """`J^T d` of the declared covariance has the size of the noise that was sent."""
    given = release()
    sent = PriorNoise(noise_ratio=0.5).start(KEY, run=b"").protect(given)
    jacobian = given.jacobian
    count = jacobian.size
    eye = torch.eye(count, dtype=torch.float64).reshape(count, 1, *given.inputs.shape[1:])
    each = torch.stack([sent.knowledge.displacement(e.expand_as(given.inputs)) for e in eye]).flatten(2)
    rows = jacobian.dense()
    expected = sum(torch.trace(rows[r].T @ each[:, r] @ rows[r]) for r in range(len(given.inputs))).sqrt().item()
    # The factor is that of one draw, in which some 16 directions carry most of the noise.
    assert size(noise_of(sent, given)) == pytest.approx(expected, rel=0.5)


def test_a_multiplier_needs_a_sensitivity():
    with pytest.raises(InputError, match="Clip first"):
        Noise(strength=NoiseMultiplier(value=1.0)).start(KEY, run=b"").protect(release())
    given = Release({"a": torch.zeros(20_000, dtype=torch.float64)}, sensitivity=0.5)
    sent = Noise(strength=NoiseMultiplier(value=2.0)).start(KEY, run=b"").protect(given)
    assert sent.message["a"].std().item() == pytest.approx(1.0, rel=0.02)


def test_steps_share_no_noise():
    given = release()
    both = Compose(steps=(GaussianNoise(std=1.0), GaussianNoise(std=1.0))).start(KEY, run=b"").protect(given)
    single = GaussianNoise(std=1.0).start(KEY, run=b"").protect(given)
    one, two = noise_of(single, given), noise_of(both, given)
    assert size(two) / size(one) == pytest.approx(2**0.5, rel=0.1)
    assert both.knowledge.variance == pytest.approx(2.0)


def test_what_is_withdrawn_is_not_drawn_again():
    given = release()
    protector = GaussianNoise(std=1.0).start(KEY, run=b"")
    first = noise_of(protector.protect(given), given)
    protector.withdraw()
    assert protector.rounds == 0
    second = noise_of(protector.protect(given), given)
    assert not any(torch.equal(first[n], second[n]) for n in given.gradient)
    fresh = GaussianNoise(std=1.0).start(KEY, run=b"")
    with pytest.raises(InputError, match="nothing to withdraw"):
        fresh.withdraw()


def test_a_step_that_fails_takes_the_others_back():
    given = release()
    protector = Compose(steps=(GaussianNoise(std=1.0), Noise(strength=NoiseMultiplier(value=1.0)))).start(KEY, run=b"")
    with pytest.raises(InputError, match="Clip first"):
        protector.protect(given)
    assert [step.rounds for step in protector.steps] == [0, 0]


def test_a_stream_goes_on_with_its_key_and_only_with_it():
    given = release()
    protector = GaussianNoise(std=1.0).start(KEY, run=b"")
    protector.protect(given)
    state = protector.state_dict()
    assert KEY not in repr(state).encode()
    expected = protector.protect(given).message
    resumed = GaussianNoise(std=1.0).start(KEY, run=b"")
    resumed.load_state_dict(state)
    found = resumed.protect(given).message
    assert all(torch.equal(found[n], m) for n, m in expected.items())
    with pytest.raises(InputError, match="another noise stream"):
        GaussianNoise(std=1.0).start(b"j" * 32).load_state_dict(state)


def test_a_second_start_with_the_same_key_has_other_noise():
    given = release()
    one, other = (GaussianNoise(std=1.0).start(KEY).protect(given).message for _ in range(2))
    assert not any(torch.equal(one[n], other[n]) for n in one)
    first = GaussianNoise(std=1.0).start(KEY)
    first.protect(given)
    resumed = GaussianNoise(std=1.0).start(KEY)
    resumed.load_state_dict(first.state_dict())
    expected, found = first.protect(given).message, resumed.protect(given).message
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_steps_go_on_too():
    given = release()
    defense = Compose(steps=(GaussianNoise(std=1.0), GaussianNoise(std=1.0)))
    first, resumed = defense.start(KEY), defense.start(KEY)
    first.protect(given)
    resumed.load_state_dict(first.state_dict())
    expected, found = first.protect(given).message, resumed.protect(given).message
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_release_without_its_batch_says_what_is_missing():
    bare = Release(release().gradient)
    assert GaussianNoise(std=1.0).start(KEY, run=b"").protect(bare).message.keys() == bare.gradient.keys()
    with pytest.raises(InputError, match="loss_gradient"):
        PriorNoise().start(KEY, run=b"").protect(bare)
    with pytest.raises(InputError, match="needs its `gradient`"):
        Release()
    function, inputs, targets = batch(dense)
    with pytest.raises(InputError, match="name each example"):
        Release(loss_gradient=function, inputs=inputs, targets=targets, ids=[1])


def test_what_is_no_part_is_refused():
    with pytest.raises(InputError, match="`law` must be"):
        Noise(law="gaussian")
    with pytest.raises(InputError, match="takes defenses"):
        Compose(steps=(gg.attacks.DLG(),))
    with pytest.raises(InputError, match="at least one"):
        Compose(steps=())
    with pytest.raises(InputError, match="not negative"):
        Std(value=-1.0)


def test_a_defense_of_ones_own_starts_too():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Mine(Defense):
        def perturbation(self, gradient, jacobian=None, *, generator=None):
            return {n: gg.defenses.randn(g.shape, g, generator, n) for n, g in gradient.items()}

    given = release()
    sent = Mine().start(KEY, run=b"").protect(given)
    assert sent.knowledge.noisy
    assert sent.cost["std"] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("wanted", [14.0, 25.0, 40.0])
def test_the_least_noise_that_holds_a_floor(wanted):
    given = release()
    std = Floor(psnr=wanted).std(given, Isotropic().prepare(given))
    at, below = (
        bayes_floor(given.jacobian, PowerLawPrior(), variance=s**2).psnr.max().item() for s in (std, 0.99 * std)
    )
    assert at <= wanted < below


def test_a_floor_that_no_noise_holds_is_refused():
    given = release()
    with pytest.raises(InputError, match="the prior alone"):
        Noise(strength=Floor(psnr=5.0)).start(KEY, run=b"").protect(given)
    with pytest.raises(InputError, match="before it is drawn"):
        Noise(law=PriorDirections(), strength=Floor(psnr=20.0)).start(KEY, run=b"").protect(given)
