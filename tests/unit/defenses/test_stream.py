"""Noise that nobody else can draw: keys, addresses, copies, and what a missing generator means."""

import copy
import hashlib
import os
import pickle
import stat
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from gradguard import Guard, InputError, InputJacobian, LossGradient, SeededNoiseWarning
from gradguard.defenses import (
    Defense,
    GaussianNoise,
    MessageNoise,
    NoiseStream,
    PriorNoise,
    Pruning,
    SmallEigenspaceNoise,
    noise_key,
    randn,
)
from gradguard.functional.vectors import flatten

KEY = bytes(range(32))
NOISES = [GaussianNoise(noise_ratio=0.5), GaussianNoise(std=0.1), PriorNoise(), SmallEigenspaceNoise()]


class UsersOwn(Defense):
    """Hands `generator` to PyTorch, where `None` means the global generator."""

    def perturbation(self, gradient, jacobian=None, *, generator=None):
        return {n: torch.randn(g.shape, dtype=g.dtype, generator=generator) for n, g in gradient.items()}


@pytest.fixture
def case(convnet, cross_entropy, batch):
    function = LossGradient(convnet, cross_entropy)
    return function(*batch), InputJacobian(function, *batch)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs().item()


# ---------------------------------------------------------------------- addresses


def test_the_same_address_gives_the_same_noise_and_any_other_gives_other_noise():
    stream = NoiseStream(KEY)
    noise = stream.normal(3, "0.weight", (4, 25))
    assert torch.equal(noise, NoiseStream(KEY).normal(3, "0.weight", (4, 25)))
    others = [
        stream.normal(4, "0.weight", (4, 25)),
        stream.normal(3, "0.bias", (4, 25)),
        stream.normal(3, "0.weight", (4, 25), draw=1),
        stream.normal(3, "0.weight", (101,))[:100],
        NoiseStream(KEY, run=b"other").normal(3, "0.weight", (4, 25)),
        NoiseStream(KEY[::-1]).normal(3, "0.weight", (4, 25)),
        NoiseStream(KEY, secure=True).normal(3, "0.weight", (4, 25)),
    ]
    for other in others:
        assert not torch.isin(noise.flatten(), other.flatten()).any()


@pytest.mark.parametrize("secure", [False, True])
def test_noise_is_standard_normal(secure):
    noise = NoiseStream(KEY, secure=secure).normal(0, "w", (600_001,)).numpy()  # several chunks, an odd number
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / 600_000**0.5
    half = len(noise) // 2  # radius and angle come from the two halves
    assert abs(np.corrcoef(noise[:half] ** 2, noise[half : 2 * half] ** 2)[0, 1]) < 5 / half**0.5


def test_the_noise_is_that_of_its_definition():
    """Written down once more without gradguard: BLAKE2b of the address, SHAKE-128, Box and Muller."""
    key = hashlib.blake2b(b"", key=KEY, digest_size=64, person=b"gradguard run").digest()
    address = b"draw" + np.array([7, 0, 5], dtype="<u8").tobytes() + b"w"
    seed = hashlib.blake2b(address, key=key, digest_size=64, person=b"gradguard noise").digest()
    words = np.frombuffer(hashlib.shake_128(seed + bytes(8)).digest(48), dtype="<u8")
    u = ((words >> np.uint64(11)).astype(float) + 0.5) / 2**53
    radius, angle = np.sqrt(-2 * np.log(u[:3])), 2 * np.pi * u[3:]
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:5]
    np.testing.assert_allclose(NoiseStream(KEY).normal(7, "w", (5,)).numpy(), expected, rtol=1e-12)


def test_a_round_is_never_given_to_two_messages():
    stream = NoiseStream(KEY, start=2)
    assert stream.message().round == 2
    assert stream.message(round=5).round == 5
    assert stream.round == 6
    for used in (2, 4, 5):
        with pytest.raises(InputError, match=rf"Round {used} of this noise stream has been used \(the next is 6\)"):
            stream.message(round=used)


def test_a_tensor_drawn_twice_in_a_message_gets_other_noise():
    message = NoiseStream(KEY).message()
    first, second = message.normal("w", (100,)), message.normal("w", (100,))
    assert not torch.isin(first, second).any()
    assert torch.equal(second, NoiseStream(KEY).normal(0, "w", (100,), draw=1))


def test_pytorchs_generator_gets_a_whole_state_from_the_key():
    """PyTorch's generator on the CPU keeps 32 bits of a seed; the state given to it here is drawn whole."""
    assert torch.equal(*(torch.randn(9, generator=torch.Generator().manual_seed(s)) for s in (1, 1 + 2**32)))
    states = {bytes(NoiseStream(KEY).message(round=r).get_state().numpy().tobytes()) for r in range(50)}
    assert len(states) == 50
    numbers = torch.randn(100_000, generator=NoiseStream(KEY).message())
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3
    assert torch.equal(numbers, torch.randn(100_000, generator=NoiseStream(KEY).message()))


# ---------------------------------------------------------------------- keys


def test_a_key_shows_nowhere():
    stream = NoiseStream(KEY)
    for text in (repr(stream), stream.fingerprint, str(vars(stream.message()).keys())):
        assert KEY.hex() not in text
    with pytest.warns(UserWarning, match="does not hold its key"):
        pickled = pickle.dumps(stream)
    assert KEY not in pickled
    assert stream._key not in pickled


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_is_a_stream_of_its_own(again):
    """A callback or guard that is copied for every client must not send the same noise from each."""
    stream = NoiseStream()
    other = again(stream)
    assert other.fingerprint != stream.fingerprint
    assert cosine(stream.normal(0, "w", (100_000,)), other.normal(0, "w", (100_000,))) < 0.02
    message = stream.message()
    assert cosine(message.normal("w", (100_000,)), again(message).normal("w", (100_000,))) < 0.02


def test_a_forked_process_is_a_stream_of_its_own():
    stream = NoiseStream()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, stream.message().normal("w", (4,)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reader, 32))
    assert not np.isin(stream.message().normal("w", (4,)).numpy(), theirs).any()


def test_a_key_file_is_made_once_for_its_owner(tmp_path):
    path = tmp_path / "noise.key"
    key = noise_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert noise_key(path) == key
    path.chmod(0o644)
    with pytest.raises(InputError, match="Others than its owner may read the noise key"):
        noise_key(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(InputError, match="holds no noise key"):
        noise_key(path)
    with pytest.raises(InputError, match="cannot be written"):
        noise_key(tmp_path / "nowhere" / "noise.key")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseStream(b"short"), "`key` must be 32 random bytes.*got 5"),
        (lambda: NoiseStream("x" * 32), "`key` must be 32 random bytes.*got a str"),
        (lambda: NoiseStream(start=-1), "`start` must be at least 0, got -1"),
    ],
)
def test_bad_streams(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------------- without a generator


@pytest.mark.parametrize("defense", [*NOISES, UsersOwn()], ids=repr)
def test_without_a_generator_the_noise_is_secret(case, defense):
    """`seed_everything(42)` at every client must not give every client the same noise."""
    deltas = []
    for _ in range(2):
        torch.manual_seed(42)
        before = torch.get_rng_state()
        deltas.append(flatten(defense.checked_perturbation(*case)))
        assert torch.equal(torch.get_rng_state(), before)
    assert cosine(*deltas) < 0.9  # draws of a few hundred directions; the same noise has 1


@pytest.mark.parametrize("defense", NOISES, ids=repr)
def test_the_law_itself_is_secret_too(case, defense):
    torch.manual_seed(42)
    first = flatten(defense.perturbation(*case))
    torch.manual_seed(42)
    before = torch.get_rng_state()
    assert cosine(first, flatten(defense.perturbation(*case))) < 0.9
    assert torch.equal(torch.get_rng_state(), before)


def test_two_clients_with_the_same_seed_have_other_noise():
    like = torch.zeros(())
    torch.manual_seed(42)
    first = randn((1_000_000,), like, None)
    torch.manual_seed(42)
    assert cosine(first, randn((1_000_000,), like, None)) < 0.01


def test_protect_and_audit_leave_the_global_random_state_alone(convnet, cross_entropy, batch):
    guard = Guard(defense=GaussianNoise(noise_ratio=0.5), attacks=())
    sent = []
    for _ in range(2):
        torch.manual_seed(42)
        before = torch.get_rng_state()
        sent.append(flatten(guard.protect(convnet, cross_entropy, *batch, verify=False)[0] or {"": torch.zeros(1)}))
        guard.audit(convnet, cross_entropy, *batch)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_seeded_generator_is_reproducible_and_says_so(case):
    gradient, _ = case
    noise = GaussianNoise(noise_ratio=0.5)
    with pytest.warns(SeededNoiseWarning, match="the noise comes from a seed"):
        first, again = (noise(gradient, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(flatten(first), flatten(again))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noise(gradient)
        noise(gradient, generator=NoiseStream(KEY).message())
        Pruning(fraction=0.5)(gradient, generator=torch.Generator())


def test_a_message_addresses_each_tensor_by_its_name(case):
    gradient, _ = case
    std = 0.1
    delta = GaussianNoise(std=std).checked_perturbation(gradient, generator=NoiseStream(KEY).message())
    for name, d in delta.items():
        torch.testing.assert_close(d, std * NoiseStream(KEY).normal(0, name, d.shape))


# ---------------------------------------------------------------------- nothing leaves bare


@pytest.mark.parametrize("defense", [PriorNoise(noise_ratio=0.5), SmallEigenspaceNoise(noise_ratio=0.5)], ids=repr)
def test_tensors_that_the_jacobian_does_not_reach_get_isotropic_noise(case, defense):
    """An auxiliary head beside the measured function, by a name of its own or with nothing of the input in it."""
    gradient, jacobian = case
    aside = {"aux.weight": torch.randn(64, 100, dtype=torch.float64), "aux.bias": torch.ones(50, dtype=torch.float64)}
    sent = defense(gradient | aside, jacobian)
    for name, g in aside.items():
        ratio = (torch.linalg.vector_norm(sent[name] - g) / torch.linalg.vector_norm(g)).item()
        assert ratio == pytest.approx(0.5, rel=0.5)
    inside = torch.linalg.vector_norm(flatten({n: sent[n] - g for n, g in gradient.items()}))
    torch.testing.assert_close(inside, 0.5 * torch.linalg.vector_norm(flatten(gradient)))


def test_message_noise_is_a_generator():
    assert isinstance(NoiseStream().message(), torch.Generator)
    assert isinstance(NoiseStream().message(), MessageNoise)
