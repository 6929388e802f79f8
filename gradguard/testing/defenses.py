"""The contract of defenses: `check_defense(MyDefense(noise_ratio=0.5))` in a test of your own."""

from __future__ import annotations

import torch

from gradguard.defenses.base import Defense
from gradguard.functional.jacobian import InputJacobian
from gradguard.testing.options import check_options, check_refused
from gradguard.testing.settings import batch, dense
from gradguard.testing.unchanged import unchanged


def check_defense(defense: Defense) -> None:
    """Check what every defense promises.

    Options are frozen and their repr makes them again; a gradient comes back with its names, shapes and dtypes, finite,
    and the one that was given is unchanged, as the model and the batch are; the same generator gives the same
    perturbation; a broken gradient, and a Jacobian that is needed and not there, are refused.

    Args:
        defense: at any strength.

    Raises:
        AssertionError: naming the promise that is not kept.
    """
    check_options(defense)
    function, inputs, targets = batch(dense)
    gradient = function(inputs, targets)
    jacobian = InputJacobian(function, inputs, targets)
    sent = []
    for _ in range(2):
        with unchanged(function.model, *gradient.values(), inputs, targets):
            sent.append(defense(gradient, jacobian, generator=torch.Generator().manual_seed(7)))
    for name, value in gradient.items():
        assert list(sent[0]) == list(gradient), f"it returns {list(sent[0])}"
        got = sent[0][name]
        assert got.shape == value.shape, f"{name!r} has shape {tuple(got.shape)}, not {tuple(value.shape)}"
        assert got.dtype == value.dtype, f"{name!r} is {got.dtype}, not {value.dtype}"
        assert bool(torch.isfinite(got).all()), f"{name!r} is not finite"
        assert torch.equal(got, sent[1][name]), "the same generator gives another perturbation"
    name = next(iter(gradient))
    broken = gradient | {name: torch.full_like(gradient[name], float("nan"))}
    check_refused("a gradient with NaN", lambda: defense(broken, jacobian))
    if defense.needs_jacobian:
        check_refused("no Jacobian", lambda: defense(gradient))
