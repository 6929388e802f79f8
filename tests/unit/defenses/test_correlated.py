"""Correlated streams: against a dense solve, and what they promise of messages that stay, keys and learning rates."""

from unittest import mock

import numpy as np
import pytest
import torch

from gradguard.defenses import CorrelatedNoise, Lambda, Noise, Ratio, Release, SquareRoot, Std, TwoBuffers
from gradguard.defenses.laws import PriorDirections
from gradguard.defenses.stream import NoiseStream
from gradguard.errors import InputError
from gradguard.linalg import toeplitz

KEY = b"k" * 32
ROUNDS = 30
SCHEDULES = [
    SquareRoot(rounds=ROUNDS, separation=ROUNDS),
    SquareRoot(rounds=ROUNDS, separation=ROUNDS, bands=5),
    Lambda(rounds=ROUNDS, separation=ROUNDS, value=0.7),
    TwoBuffers(rounds=ROUNDS, separation=ROUNDS),
]
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=["root", "root cut at 5", "lambda", "buffers"])
ZERO = {"a": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}


def dense(column):
    return sum(np.diag(np.full(len(column) - j, c), -j) for j, c in enumerate(column))


def started(schedule, key=KEY):
    return Noise(schedule=schedule, strength=Std(value=1.0)).start(key, run=b"")


def sent(protector, rate=None):
    return protector.protect(Release(ZERO, learning_rate=rate)).message["a"].flatten().numpy()


def white(rounds):
    stream = NoiseStream(KEY)
    return np.stack([stream.normal(t, "a", (3, 2)).flatten().numpy() for t in range(rounds)])


@schedules
def test_a_stream_is_the_dense_solve(schedule):
    protector = started(schedule)
    messages = np.stack([sent(protector) for _ in range(ROUNDS)])
    column = schedule.column()
    expected = np.linalg.norm(column) * np.linalg.solve(dense(column), white(ROUNDS))
    assert np.abs(messages - expected).max() < 1e-12


@schedules
def test_what_the_model_accumulates_cancels(schedule):
    """At the same noise for the attacker of all rounds, the sum of the messages carries less than fresh noise does."""
    column = schedule.column()
    errors = np.linalg.norm(column) ** 2 * toeplitz.prefix_errors(column, ROUNDS)
    assert errors.mean() < 0.8 * toeplitz.prefix_errors([1.0], ROUNDS).mean()


@schedules
def test_the_declaration_is_the_law(schedule):
    protector = started(schedule)
    found = [protector.protect(Release(ZERO)).knowledge for _ in range(3)][-1]
    round = 2
    assert found.filter.round == round
    column = found.filter.column.numpy()
    # Alone it shows the row of `C^{-1}`; whoever knows the other rounds faces the strength.
    shown = np.linalg.norm(np.linalg.inv(dense(column))[round]) * found.filter.std
    assert found.variance == pytest.approx(shown**2)
    assert found.filter.std * toeplitz.attacker_std(column, ROUNDS, [0]) == pytest.approx(1.0)
    assert shown > 1.0


@schedules
def test_a_withdrawn_message_does_not_advance_the_filter(schedule):
    plain, other = started(schedule), started(schedule)
    for round in range(8):
        expected = sent(plain)
        if round in (0, 3, 6):
            blocked = sent(other)
            other.withdraw()
            # The numbers of a message that stayed are not used for another one ...
            plain_next = sent(other)
            assert np.abs(blocked - plain_next).max() > 1e-3
        else:
            plain_next = sent(other)
        assert len(expected) == len(plain_next)
    # ... and the filter stands where the sent ones left it: the stream still solves `C x = w` for the drawn `w`.
    numbers = [1, 2, 3, 5, 6, 7, 9, 10]
    again, messages = started(schedule), []
    for round in range(8):
        if round in (0, 3, 6):
            sent(again)
            again.withdraw()
        messages.append(sent(again))
    column = schedule.column()[:8]
    w = white(11)[numbers]
    expected = np.linalg.norm(schedule.column()) * np.linalg.solve(dense(column), w)
    assert np.abs(np.stack(messages) - expected).max() < 1e-9  # buffers are solved backwards


@schedules
def test_a_message_whose_noise_fails_does_not_advance_the_filter(schedule):
    protector = started(schedule)
    sent(protector)
    before = protector.filter.state_dict()["rates"]
    draw, count = NoiseStream.normal, []

    def failing(self, round, name, shape, *, draw_=draw, draw=0):
        count.append(name)
        if name == "b":
            raise MemoryError("no room for the second tensor")
        return draw_(self, round, name, shape, draw=draw)

    with mock.patch.object(NoiseStream, "normal", failing), pytest.raises(MemoryError):
        protector.protect(Release(ZERO))
    assert "b" in count
    assert protector.rounds == 1
    assert protector.filter.state_dict()["rates"] == before
    # The next message stands where the failed one would have: what the receiver knows of it counts one before it.
    assert protector.protect(Release(ZERO)).knowledge.filter.round == 1


@schedules
def test_a_learning_rate_that_jumps_is_cancelled_with_it(schedule):
    """What the model takes is `eta_t n_t`; that stream is the one that cancels."""
    rates = [0.1, 0.1, 0.5, 0.02, 0.02, 0.3]
    protector = started(schedule)
    taken = np.stack([rate * sent(protector, rate) for rate in rates])
    column = schedule.column()
    innovations = np.asarray(rates)[:, None] * white(len(rates))
    expected = np.linalg.norm(column) * np.linalg.solve(dense(column[: len(rates)]), innovations)
    assert np.abs(taken - expected).max() < 1e-12
    assert protector.filter.knowledge(1.0).learning_rates == tuple(rates)
    with pytest.raises(InputError, match="in all rounds or in none"):
        sent(protector)


@schedules
def test_a_stream_goes_on_after_an_interruption(schedule):
    plain = started(schedule)
    for _ in range(5):
        sent(plain)
    state = plain.state_dict()
    assert KEY.hex() not in repr(state)
    resumed = started(schedule)
    resumed.load_state_dict(state)
    assert np.array_equal(sent(plain), sent(resumed))
    with pytest.raises(InputError, match="another noise stream"):
        started(schedule, b"j" * 32).load_state_dict(state)


def test_the_memory_may_not_be_longer_than_the_separation():
    assert SquareRoot(rounds=500, separation=20).bands == 20
    with pytest.raises(InputError, match="longer than the 20 rounds"):
        SquareRoot(rounds=500, separation=20, bands=64)


def test_no_gain_is_said_aloud():
    with pytest.warns(UserWarning, match="every client takes part in every round"):
        SquareRoot(rounds=50, separation=1, unit="client")


def test_a_stream_ends_where_it_was_made_to():
    protector = started(SquareRoot(rounds=2, separation=2))
    sent(protector)
    sent(protector)
    with pytest.raises(InputError, match="made for 2 rounds"):
        sent(protector)


def test_noise_that_changes_from_round_to_round_is_not_correlated():
    with pytest.raises(InputError, match="cannot be correlated"):
        Noise(law=PriorDirections(), schedule=SquareRoot(rounds=5, separation=5))


def test_a_stream_keeps_the_strength_of_its_first_message():
    protector = Noise(schedule=SCHEDULES[0], strength=Ratio(value=0.5)).start(KEY, run=b"")
    small, large = ({"a": torch.full((4,), size, dtype=torch.float64)} for size in (1.0, 100.0))
    stds = [protector.protect(Release(gradient)).cost["std"] for gradient in (small, large)]
    assert stds[0] == stds[1]


def test_a_single_call_cannot_draw_it():
    with pytest.raises(InputError, match="Start it"):
        CorrelatedNoise(std=1.0, rounds=20, separation=10)(ZERO)


def test_the_recipe_asks_for_what_it_needs():
    assert CorrelatedNoise(std=1.0, rounds=20, separation=10).made_of().schedule == TwoBuffers(rounds=20, separation=10)
    own = SquareRoot(rounds=20, separation=10)
    assert CorrelatedNoise(noise_ratio=0.5, schedule=own).made_of() == Noise(schedule=own, strength=Ratio(value=0.5))
    with pytest.raises(InputError, match="exactly one"):
        CorrelatedNoise(rounds=20, separation=10)
    with pytest.raises(InputError, match="Say how long"):
        CorrelatedNoise(std=1.0)
    with pytest.raises(InputError, match="Say how long"):
        CorrelatedNoise(std=1.0, rounds=20, separation=10, schedule=own)


def test_a_seed_gives_the_same_stream_and_two_keys_do_not():
    def first(**how):
        return Noise(schedule=SCHEDULES[0], strength=Std(value=1.0)).start(**how).protect(Release(ZERO)).message["a"]

    with pytest.warns(UserWarning, match="from a seed"):
        one = first(generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="from a seed"):
        other = first(generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, other)
    assert not torch.equal(first(), first())
