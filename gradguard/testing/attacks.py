"""The contract of attacks: `check_attack(MyAttack())` in a test of your own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gradguard.attacks.base import Attack
from gradguard.errors import InputError
from gradguard.functional.local_training import LocalTraining
from gradguard.testing.options import check_options, check_refused
from gradguard.testing.settings import observations
from gradguard.testing.unchanged import unchanged
from gradguard.threats.observation import Observation, Reconstruction


def check_attack(attack: Attack, observation_factory: Callable[[], Observation] | None = None) -> None:
    """Check what every attack promises.

    Options are frozen and their repr makes them again; wrong use is refused before the attack begins; nothing of the
    user's changes; the same generator gives the same result; the result has its fields, shapes and dtypes, and shows
    no private tensor.

    Args:
        attack: with options under which it ends soon; it is run twice.
        observation_factory: makes what it attacks. Default: the first of three small settings (a convolution, a fully
            connected network with ReLU, batch normalisation) that the attack does not refuse.

    Raises:
        AssertionError: naming the promise that is not kept.
    """
    check_options(attack)
    observation = observation_factory() if observation_factory is not None else accepted(attack)
    check_refusals(attack, observation)
    tensors = [*observation.sent.values(), *([] if observation.labels is None else [observation.labels])]
    results = []
    for _ in range(2):
        with unchanged(observation.loss_gradient.model, *tensors):
            results.append(attack(observation, generator=torch.Generator().manual_seed(7)))
    for result in results:
        check_result(attack, observation, result)
    for name in ("inputs", "labels", "label_counts"):
        one, other = (getattr(result, name) for result in results)
        same = one is other if one is None or other is None else torch.equal(one, other)
        assert same, f"the same generator gives other `{name}`: draw all random numbers from it"


def accepted(attack: Attack) -> Observation:
    """The first small setting that `attack` does not refuse."""
    reasons = []
    for observation in observations(labels=attack.recovers_inputs):
        try:
            attack.check_all(observation)
        except InputError as error:
            reasons.append(str(error))
        else:
            return observation
    raise AssertionError(f"{attack.name} refuses every setting; give `observation_factory`. It says: {reasons}")


def check_refusals(attack: Attack, observation: Observation) -> None:
    """Wrong use is an `InputError`, before `run`."""
    no_such_shape = (*observation.input_shape[:-1], observation.input_shape[-1] + 1)
    some = dict(list(observation.sent.items())[1:])
    cases: dict[str, Any] = {
        "no observation": (None, None),
        "a seed as generator": (observation, 3),
        "inputs of another shape": (replace(observation, input_shape=no_such_shape), None),
    }
    if not attack.takes_local_training:
        local = LocalTraining(steps=2, learning_rate=0.1)
        cases["local steps"] = (replace(observation, local=local), None)
    if not attack.takes_missing_gradients and some:
        cases["parameters that were not sent"] = (replace(observation, sent=some), None)
    if not attack.takes_free_scale:
        cases["an unknown factor"] = (replace(observation, scale=None), None)
    begins = [name for name in ("run", "_run") if hasattr(attack, name)]
    for what, (wrong, generator) in cases.items():
        with ExitStack() as patches:
            for name in begins:
                patches.enter_context(mock.patch.object(type(attack), name, _begun))
            check_refused(what, partial(attack, wrong, generator=generator))


def check_result(attack: Attack, observation: Observation, result: Reconstruction) -> None:
    """Fields, shapes and dtypes, and nothing private in the repr."""
    assert isinstance(result, Reconstruction), f"an attack returns a `Reconstruction`, not {type(result).__name__}"
    assert result.attack == attack.name, f"`attack` is {result.attack!r}"
    count, shape = observation.batch_size, observation.input_shape
    if result.inputs is not None:
        assert attack.recovers_inputs, "`recovers_inputs` is False, and there are inputs"
        assert result.inputs.shape == (count, *shape), f"`inputs` have shape {tuple(result.inputs.shape)}"
        assert result.inputs.is_floating_point(), f"`inputs` are {result.inputs.dtype}"
        assert not result.inputs.requires_grad, "`inputs` hold a graph"
    if result.labels is not None:
        assert len(result.labels) == count, f"{len(result.labels)} labels for {count} examples"
        whole = result.labels.dtype == torch.int64 or result.labels.is_floating_point()
        assert whole, f"`labels` are {result.labels.dtype}"
    if result.label_counts is not None:
        assert result.label_counts.dtype == torch.int64, f"`label_counts` are {result.label_counts.dtype}"
        assert bool((result.label_counts >= 0).all()), "a count is negative"
    if not attack.recovers_inputs:
        assert result.label_counts is not None, "an attack on labels returns `label_counts`"
    if result.inputs is not None and result.labels is not None:
        assert result.matching_loss >= 0 or math.isnan(result.matching_loss)
    assert isinstance(result.matching_loss, float), f"`matching_loss` is {type(result.matching_loss).__name__}"
    assert isinstance(result.converged, bool), f"`converged` is {type(result.converged).__name__}"
    assert result.seconds >= 0, f"`seconds` is {result.seconds}"
    _check_plain("details", result.details)
    assert "tensor(" not in repr(result), "its repr shows tensors"


def _begun(*_: object, **__: object) -> None:
    raise AssertionError("the attack began before wrong use was refused")


def _check_plain(where: str, value: object) -> None:
    """Numbers, strings, and lists and dictionaries of them."""
    assert not isinstance(value, Tensor), f"`{where}` is a tensor; details are plain numbers and strings"
    if isinstance(value, dict):
        for name, part in value.items():
            _check_plain(f"{where}[{name!r}]", part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(f"{where}[...]", part)
