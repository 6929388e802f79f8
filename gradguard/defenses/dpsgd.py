"""DP-SGD: clip every example, add independent Gaussian noise."""

from __future__ import annotations

from gradguard.defenses.clipping import ClipPerExample
from gradguard.defenses.compose import Compose
from gradguard.defenses.noise import Noise
from gradguard.defenses.strengths import Epsilon, NoiseMultiplier, Strength
from gradguard.errors import InputError


def DPSGD(
    *,
    max_norm: float,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    rounds: int | None = None,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
) -> Compose:
    """DP-SGD (Abadi et al. 2016, Algorithm 1) as clipping followed by noise.

    Args:
        max_norm: what each example's gradient is clipped to.
        noise_multiplier: the noise's standard deviation over `max_norm`, in the sum over examples; or
        epsilon: the budget of the whole run, with `delta` and `rounds`.
        delta: see `Epsilon`.
        rounds: see `Epsilon`.
        sample_rate: see `Epsilon`: only if the loader samples so (Poisson).
        expected_batch_size: what the sum is divided by (default: the batch's size); needed with Poisson sampling.

    Returns:
        `Compose(steps=(ClipPerExample(...), Noise(strength=...)))`.

    Raises:
        InputError: unless exactly one of `noise_multiplier` and (`epsilon`, `delta`, `rounds`) is given.
    """
    strength: Strength
    if noise_multiplier is not None and (epsilon, delta, rounds, sample_rate) == (None, None, None, None):
        strength = NoiseMultiplier(value=noise_multiplier)
    elif noise_multiplier is None and epsilon is not None and delta is not None and rounds is not None:
        strength = Epsilon(epsilon=epsilon, delta=delta, rounds=rounds, sample_rate=sample_rate)
    else:
        raise InputError("Give `DPSGD` either `noise_multiplier`, or `epsilon`, `delta` and `rounds`.")
    clip = ClipPerExample(max_norm=max_norm, expected_batch_size=expected_batch_size)
    return Compose(steps=(clip, Noise(strength=strength)))
