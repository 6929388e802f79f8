"""Soteria: prune the classifier's gradient at the features that move most with the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradguard.defenses.release import Release
from gradguard.defenses.transforms.base import Transformation, check_fraction
from gradguard.defenses.transforms.pruning import smallest
from gradguard.errors import UnsupportedModelError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient
from gradguard.threats.knowledge import Knowledge

#: Features whose derivatives are taken at a time.
CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Soteria(Transformation):
    """Drop columns of the classifier's weight gradient (Sun et al. 2021, "Soteria", arXiv 2012.06043).

    Of the features `r` that go into the layer, those with the smallest `|dr_i/dx| / |r_i|`, summed over the batch, are
    dropped, as in the authors' code. Known to be broken by leaving out what was dropped (Balunovic et al. 2022): it
    draws nothing secret, and all other layers are sent as they are.

    Args:
        layer: The name of the Linear layer in `named_modules()`. Default: the last one.
        fraction: Share of the features that is dropped, in (0, 1).

    Raises:
        InputError: If `fraction` is outside its range.
    """

    needs_jacobian: ClassVar[bool] = True
    layer: str | None = None
    fraction: float = 0.4

    def __post_init__(self) -> None:
        check_fraction(self.fraction)

    def transformed(self, gradient: Gradient, jacobian: InputJacobian | None, generator: torch.Generator) -> Gradient:
        """The gradient without those columns."""
        assert jacobian is not None  # `__call__` has refused it
        name, module = self._module(jacobian.gradient.model, gradient)
        dropped = smallest(sensitivity(jacobian, module), self.fraction)
        return gradient | {name: torch.where(dropped, torch.zeros_like(gradient[name]), gradient[name])}

    def knowledge(self, release: Release, message: Gradient) -> Knowledge:
        """The columns that are zero were not sent; those that are left are as good as any."""
        assert release.loss_gradient is not None
        name, _ = self._module(release.loss_gradient.model, message)
        mask = {n: torch.ones_like(m, dtype=torch.bool) for n, m in message.items()}
        mask[name] = (message[name] != 0).any(0).expand(message[name].shape)
        return Knowledge(mask=mask)

    def _module(self, model: nn.Module, gradient: Gradient) -> tuple[str, nn.Linear]:
        """The layer, and its weight's name."""
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        known = {n: m for n, m in linear.items() if (f"{n}.weight" if n else "weight") in gradient}
        if not known or (self.layer is not None and self.layer not in known):
            raise UnsupportedModelError(
                f"Soteria prunes a Linear layer whose gradient is sent; `layer={self.layer!r}` is none of "
                f"{list(known)[-5:]}. Name one of `model.named_modules()`, or use `Pruning`."
            )
        name = self.layer if self.layer is not None else list(known)[-1]
        return (f"{name}.weight" if name else "weight"), known[name]


def sensitivity(jacobian: InputJacobian, module: nn.Linear) -> Tensor:
    """`sum |dr_i/dx| / |r_i|` over the batch for the features `r` that go into `module`.

    Args:
        jacobian: of the batch.
        module: of its model, called with one row of features per example.

    Returns:
        Shape `(F,)`.

    Raises:
        UnsupportedModelError: if the layer is not reached, or gets something else.
    """
    function, (inputs, targets) = jacobian.gradient, jacobian.batch
    x = function.cast(inputs).detach().requires_grad_(True)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        with torch.enable_grad():
            function.outputs(function.parameters(), x, function.cast(targets))
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(x) or not seen[0].requires_grad:
        raise UnsupportedModelError(
            "Soteria needs a Linear layer that the model calls once, with one row of features per example that depends "
            "on the inputs. Name another `layer`, or use `Pruning`."
        )
    features, sizes = seen[0], []
    for part in torch.arange(features.shape[1], device=features.device).split(CHUNK):
        rows = torch.zeros(len(part), *features.shape, dtype=features.dtype, device=features.device)
        rows[torch.arange(len(part)), :, part] = 1
        (slopes,) = torch.autograd.grad(features, x, rows, retain_graph=True, is_grads_batched=True)
        sizes.append(slopes.flatten(2).norm(dim=-1))
    small = torch.finfo(features.dtype).tiny
    return (torch.cat(sizes) / features.detach().T.abs().clamp_min(small)).sum(1)
