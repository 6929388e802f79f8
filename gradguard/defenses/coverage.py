"""Nothing leaves bare: what a defense does not reach gets isotropic noise, or is refused by name.

Noise in the range of `J^T` is zero where the gradient does not depend on the inputs through the measured function: an
auxiliary head that only another loss term reaches, an embedding table beside `inputs_embeds`, layers behind a
`detach`. Such tensors can give an input away all the same, since something computed them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gradguard.defenses.draws import randn
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.reach import unreached_parameters
from gradguard.functional.vectors import Gradient, norm

if TYPE_CHECKING:
    from gradguard.defenses.base import Defense

Uncovered = Literal["noise", "refuse"]

#: A tensor whose noise, relative to itself, is this much below the whole message's counts as bare.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Covered:
    """`message`: what may be sent. `bare`: names of tensors that the defense alone would have left as they are."""

    message: Gradient
    bare: tuple[str, ...] = ()


def cover(
    defense: Defense,
    gradient: Gradient,
    jacobian: InputJacobian | None = None,
    *,
    uncovered: Uncovered = "noise",
    generator: torch.Generator | None = None,
) -> Covered:
    """`gradient` as `defense` sends it, and nothing of it bare.

    Args:
        defense: what perturbs it. One that draws nothing at random (`random` is False: pruning) is taken as it is.
        gradient: one tensor per parameter.
        jacobian: where the defense needs one.
        uncovered: "noise" adds isotropic Gaussian noise to the elements that the defense leaves as they are, at the
            defense's ratio of noise to message, relative to those elements' own norm; zeros among them get it too,
            since which are zero tells something. "refuse" raises.
        generator: all randomness.

    Returns:
        The message and the names of the tensors that got noise beside the defense's own.

    Raises:
        InputError: with `uncovered="refuse"` for bare tensors; and if the defense adds nothing to anything.
    """
    if uncovered not in ("noise", "refuse"):
        raise InputError(f'`uncovered` must be "noise" or "refuse", got {uncovered!r}.')
    if uncovered == "refuse" and jacobian is not None:
        # A defense that covers by itself what `J^T` does not reach would show no bare tensor below.
        unreached = unreached_parameters(jacobian.gradient, *jacobian.batch)
        _refuse(defense, [n for n in unreached if n in gradient and bool(gradient[n].count_nonzero())])
    message = defense(gradient, jacobian, generator=generator)
    if not getattr(defense, "random", True):
        return Covered(message=message)
    return cover_message(defense, gradient, message, uncovered, generator)


def cover_message(
    defense: Defense, gradient: Gradient, message: Gradient, uncovered: Uncovered, generator: torch.Generator | None
) -> Covered:
    """`message`, what a noise made of `gradient`, and nothing of it bare: the second half of `cover`.

    Args:
        defense: for messages.
        gradient: before the noise.
        message: after it; changed in place where it is bare.
        uncovered: as in `cover`.
        generator: of the noise that is added.

    Returns:
        The message and the names of the tensors that got noise.

    Raises:
        InputError: as `cover`.
    """
    length = norm(gradient)
    if not length > 0:
        return Covered(message=message)
    ratio = norm({n: message[n] - g for n, g in gradient.items()}) / length
    if not ratio > 0:
        raise InputError(
            f"{defense.name} adds nothing to this gradient (its noise is zero everywhere: the gradient does not "
            "depend on the inputs), so it would leave bare. Use `GaussianNoise`, which covers every tensor."
        )
    masks = {n: _bare(g, message[n] - g, ratio) for n, g in gradient.items()}
    names = tuple(n for n, mask in masks.items() if mask is not None)
    if uncovered == "refuse":
        _refuse(defense, names)
    for name in names:
        mask = masks[name]
        assert mask is not None
        message[name] = torch.where(mask, _noisy(gradient[name], mask, ratio, generator, name), message[name])
    return Covered(message=message, bare=names)


def isotropic(gradient: Gradient, ratio: float | Tensor, generator: torch.Generator | None = None) -> Gradient:
    """Every tensor with Gaussian noise of `ratio` times its own norm (in expectation): for what no model holds."""
    return {n: _noisy(g, torch.ones_like(g, dtype=torch.bool), ratio, generator, n) for n, g in gradient.items()}


def _refuse(defense: Defense, names: Sequence[str]) -> None:
    if names:
        raise InputError(
            f"{defense.name} leaves the tensors {list(names)[:5]} of the message as they are: the measured loss does "
            'not reach them. Leave them out of the message, add their loss to the measured one, or `uncovered="noise"`.'
        )


def _bare(gradient: Tensor, delta: Tensor, ratio: Tensor) -> Tensor | None:
    """Which elements a perturbation leaves as they are; `None` if those are all zero, or none."""
    own = torch.linalg.vector_norm(gradient)
    if torch.linalg.vector_norm(delta) <= NEGLIGIBLE * ratio * own:
        mask = torch.ones_like(gradient, dtype=torch.bool)
    else:
        mask = delta == 0
    return mask if bool((gradient[mask] != 0).any()) else None


def _noisy(tensor: Tensor, mask: Tensor, ratio: float | Tensor, generator: torch.Generator | None, name: str) -> Tensor:
    part = tensor[mask]
    std = ratio * torch.linalg.vector_norm(part) / max(part.numel(), 1) ** 0.5
    return tensor + std * randn(tensor.shape, tensor, generator, name)
