"""Secret noise: a key per stream, and an address `(round, tensor)` for every number drawn from it.

The noise of a defense protects only while nobody else can draw it again. A seed cannot do that: people leave it at its
default, `seed_everything(42)` is the same line at every client, and PyTorch's generator on the CPU takes 32 bits of a
seed, which a laptop tries out in hours. Nor is the generator secret once its seed is: parts of a gradient are known
(the zeros of a dead unit or an unused token show the noise bare), and from 624 outputs of MT19937 all others follow.
So every number here is a keyed hash of its address, expanded by SHAKE-128, and turned into normal numbers in float64.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradguard.errors import InputError

#: Bytes of a key.
KEY_BYTES = 32
#: Normal numbers made at once: 2 MiB of key stream, which stay in a core's cache.
CHUNK = 2**18
#: What is said wherever noise is given a seed.
SEEDED = (
    "the noise comes from a seed: whoever knows the seed, or tries them all, can subtract it from what is sent. A seed "
    "is for tests and benchmarks; leave it out and the noise is secret."
)


#: `(name, shape, draw)` to the noise of an address within one message: float64 on the CPU.
Numbers = Callable[[str, "tuple[int, ...] | torch.Size", int], Tensor]


class NoiseStream:
    """The secret noise of one sender: `(key, round, tensor)` gives the noise of one tensor of one message.

    Guarantees: the same address gives the same noise (on the same machine bit for bit), another address independent
    noise, as far as SHAKE-128 and keyed BLAKE2b are pseudo-random: noise that is known at some elements tells nothing
    of the rest. `message()` never gives a round twice. A copy, a pickle or a forked process never continues the
    stream: it begins one of its own. The global random state is neither read nor moved, and `repr`, copies and pickles
    do not hold the key.
    Does not guarantee: anything once the key is known. Two processes that are given the same `key` and `run`, or one
    that is resumed from an older checkpoint, draw the same rounds twice; the difference of two such messages is free
    of noise. Without `secure` no protection against attacks on the rounding of floating-point noise (Mironov 2012),
    which matter for an (epsilon, delta) claim alone; with it the attack of Holohan and Braghin 2021 is out of reach,
    as in Opacus's secure mode, but scaling and adding still round in the gradient's precision.

    Args:
        key: 32 bytes, kept secret (default: new ones from the operating system).
        run: a public label. Streams of one key and different labels are independent.
        start: the first round that may be drawn.
        secure: each number is half the sum of four independent ones (four times the cost).

    Raises:
        InputError: if `key` is too short or `start` negative.
    """

    def __init__(self, key: bytes | None = None, *, run: bytes = b"", start: int = 0, secure: bool = False) -> None:
        if key is not None and (not isinstance(key, bytes | bytearray) or len(key) < KEY_BYTES):
            raise InputError(
                f"`key` must be {KEY_BYTES} random bytes, such as `secrets.token_bytes({KEY_BYTES})`; got "
                + (f"{len(key)}." if isinstance(key, bytes | bytearray) else f"a {type(key).__name__}.")
            )
        if start < 0:
            raise InputError(f"`start` must be at least 0, got {start}.")
        self.secure = secure
        self._given = None if key is None else bytes(key)
        self._own = key is None
        self._set_key(secrets.token_bytes(KEY_BYTES) if key is None else bytes(key), run)
        self.run = run
        self._next = start

    def at(self, run: bytes, round: int) -> NoiseStream:
        """The stream of the same key with another label, from a round on: what a resumed training goes on with.

        Args:
            run: the label that the state holds.
            round: of the next message.

        Returns:
            A stream; without a key of the user's a new one, which is independent of all before it.
        """
        return NoiseStream(self._given, run=run, start=round, secure=self.secure)

    @property
    def round(self) -> int:
        """The round of the next message."""
        return self._next

    @property
    def fingerprint(self) -> str:
        """A public name of the stream: the same for the same key and run. It does not tell the key."""
        return self._hash(b"name", 16).hex()

    def message(self, round: int | None = None, *, device: torch.device | str = "cpu") -> MessageNoise:
        """The noise of the next message, to be given to a defense as its `generator`.

        Args:
            round: of this message (default: the next one). Rounds may be skipped.
            device: of the gradient.

        Returns:
            A source of random numbers for this message alone.

        Raises:
            InputError: if that round has been given out: two messages with the same noise differ by their gradients.
        """
        self._leave_a_forked_stream()
        number = self._next if round is None else round
        if number < self._next:
            raise InputError(
                f"Round {number} of this noise stream has been used (the next is {self._next}): a second message with "
                "the same noise would give both away. `NoiseStream.normal` draws earlier noise again on purpose."
            )
        self._next = number + 1
        return MessageNoise(self, number, device)

    def normal(self, round: int, name: str, shape: tuple[int, ...] | torch.Size, *, draw: int = 0) -> Tensor:
        """The standard normal noise at an address: the same each time.

        Args:
            round: of the message.
            name: of the tensor.
            shape: of the noise; another number of elements is another address.
            draw: a tensor's first, second, ... noise in one message.

        Returns:
            Float64 on the CPU.
        """
        count = math.prod(shape)
        seed = self._hash(struct.pack("<4sQQQ", b"draw", round, draw, count) + name.encode(), 64)
        if not self.secure:
            return _normal(seed, count).reshape(shape)
        total = torch.zeros(count, dtype=torch.float64, device="cpu")
        for part in range(4):
            total += _normal(seed + bytes([part]), count)
        return total.mul_(0.5).reshape(shape)

    def part(self, name: str) -> NoiseStream:
        """An independent stream of the same key, such as for one step of several: its rounds are its own.

        Args:
            name: of the part, public.

        Returns:
            The stream, at round 0.
        """
        return NoiseStream(self._hash(b"part" + name.encode(), 64), secure=self.secure)

    def skip_to(self, round: int) -> None:
        """Rounds before `round` are taken as given out: what a resumed stream begins with.

        Args:
            round: of the next message.

        Raises:
            InputError: if it lies before rounds that have been given out already.
        """
        if round < self._next:
            raise InputError(f"The noise stream stands at round {self._next} and cannot go back to {round}.")
        self._next = round

    # ------------------------------------------------------------------ the key

    def _set_key(self, key: bytes, run: bytes = b"") -> None:
        self._key = hashlib.blake2b(run, key=key[:64], digest_size=64, person=b"gradguard run").digest()
        self._pid = os.getpid()

    def _hash(self, message: bytes, size: int) -> bytes:
        return hashlib.blake2b(message, key=self._key, digest_size=size, person=b"gradguard noise").digest()

    def _leave_a_forked_stream(self) -> None:
        """After a fork parent and child hold one key and one counter: the child takes a new key."""
        if self._pid == os.getpid():
            return
        if not self._own:
            warnings.warn("A forked process does not go on with the noise stream of its parent's key.", stacklevel=3)
        self._set_key(secrets.token_bytes(KEY_BYTES))
        self._given, self._own = None, True

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._own:
            warnings.warn("A copy of a noise stream does not hold its key: it begins a new stream.", stacklevel=2)
        return _begun_anew, (self.secure,)

    def __repr__(self) -> str:
        return f"NoiseStream(round={self._next}{', secure=True' if self.secure else ''})"


class MessageNoise(torch.Generator):
    """The noise of one message. A `torch.Generator`, so that a defense of one's own may draw from it as from any.

    gradguard's defenses draw by the tensor's name, from the key stream (`normal`). `torch.randn(..., generator=)` draws
    from PyTorch's generator in a state taken from the key stream: secret, but no longer once an attacker knows some
    hundred numbers of it. Use `gradguard.defenses.randn` in a defense of your own.

    Args:
        stream: that it belongs to.
        round: of the message in it.
        device: of the gradient.
        numbers: `(name, shape, draw)` to the standard normal noise of an address, for noise that hangs together over
            messages. Default: the stream's own at this round.
    """

    def __new__(  # noqa: D102
        cls, stream: NoiseStream, round: int, device: torch.device | str = "cpu", numbers: Numbers | None = None
    ) -> MessageNoise:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(
        self, stream: NoiseStream, round: int, device: torch.device | str = "cpu", numbers: Numbers | None = None
    ) -> None:
        self.round = round
        self._stream = stream
        self._numbers = numbers
        self._draws: dict[str, int] = {}
        words = stream._hash(struct.pack("<4sQ", b"torc", round), 64)
        if torch.device(device).type == "cpu":
            # `manual_seed` keeps 32 bits of a seed. The state is: seed, left, seeded, next, 624 words, a cached normal.
            state = self.get_state().numpy().copy()
            layout = np.frombuffer(hashlib.shake_128(words).digest(624 * 4), dtype=np.uint32).astype(np.uint64)
            state[24 : 24 + 624 * 8] = np.frombuffer(layout.tobytes(), dtype=np.uint8)
            self.set_state(torch.from_numpy(state))
        else:
            self.manual_seed(int.from_bytes(words[:8], "little") >> 1)

    def normal(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Standard normal noise of the tensor `name`, other numbers at each call. Float64 on the CPU."""
        draw = self._draws.get(name, 0)
        self._draws[name] = draw + 1
        if self._numbers is not None:
            return self._numbers(name, shape, draw)
        return self._stream.normal(self.round, name, shape, draw=draw)

    def __reduce__(self) -> tuple[Any, ...]:
        return fresh_noise, ()

    def __deepcopy__(self, memo: dict) -> MessageNoise:
        return fresh_noise(self.device)


def fresh_noise(device: torch.device | str = "cpu") -> MessageNoise:
    """Noise of a new key from the operating system, for one message."""
    return NoiseStream().message(device=device)


def noise_key(path: str | Path) -> bytes:
    """The key in a file, made there if there is none, for its owner's eyes (mode 0600).

    Args:
        path: of the file: 64 hexadecimal digits.

    Returns:
        32 bytes.

    Raises:
        InputError: if others may read the file, or it holds no key.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise InputError(f"The noise key cannot be written to {str(path)!r}: {error.strerror}.") from error
    else:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_bytes(KEY_BYTES).hex() + "\n")
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"Others than its owner may read the noise key {str(path)!r}: chmod 600 it, or use a new one.")
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise InputError(f"{str(path)!r} holds no noise key: {2 * KEY_BYTES} hexadecimal digits and nothing else.")
    return key


def _normal(seed: bytes, count: int) -> Tensor:
    """`count` standard normal numbers from the key stream of `seed` (Box and Muller 1958), float64."""
    normal = torch.empty(count, dtype=torch.float64, device="cpu")
    for index, chunk in enumerate(normal.split(CHUNK)):
        pairs = -(-len(chunk) // 2)
        stream = bytearray(hashlib.shake_128(seed + struct.pack("<Q", index)).digest(16 * pairs))
        words = torch.from_numpy(np.frombuffer(stream, dtype=np.int64))
        # The middle of one of 2^53 cells: never 0, whose logarithm there is not.
        uniform = (words >> 11).bitwise_and_(2**53 - 1).to(torch.float64).add_(0.5).mul_(2.0**-53)
        radius, angle = uniform[:pairs].log_().mul_(-2.0).sqrt_(), uniform[pairs:].mul_(2 * math.pi)
        chunk[:pairs] = radius * angle.cos()
        chunk[pairs:] = (radius * angle.sin())[: len(chunk) - pairs]
    return normal


def _begun_anew(secure: bool) -> NoiseStream:
    return NoiseStream(secure=secure)
