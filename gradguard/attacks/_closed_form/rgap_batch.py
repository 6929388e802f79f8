"""R-GAP on a batch: the examples that a first linear layer with a bias gives away one by one, and a combination.

The gradient of a linear layer is `sum_r k_r x_r^T`, of rank one for one example only, so the recursion on a batch gives
a combination of its examples (Zhu & Blaschko 2021, section 3). A unit that one example alone activates (ReLU) still has
that example's rank-one row: `grad W_i / grad b_i = x_r`, exactly. Which units those are shows without knowing any
example: those of one example all have the same ratio, and mixed ones each their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.attacks._closed_form.heads import bias_head
from gradguard.chain import Affine, Chain, Reshape
from gradguard.errors import InputError
from gradguard.threats.observation import Observation

#: Relative distance up to which two units' ratios are the same: rounding of float32, some times over.
_SAME = 1e-5
#: Fewest units that must agree. Of some hundred that share two examples, two come as near to each other by chance.
_LEAST = 3
#: Bias gradients below this, relative to the largest, are rounding.
_DEAD = 1e-6


@dataclass(frozen=True)
class Examples:
    """What a first layer gives away. `exact`: `(m, n)`; `units`: how many units agree on each, int64 `(m,)`.

    `combination`: `(n,)`, what explains the gradient of the other units best; `None` if no unit is left.
    """

    exact: Tensor
    units: Tensor
    combination: Tensor | None


def check_batch(observation: Observation, chain: Chain) -> None:
    """Raises `InputError` for a batch on anything but a chain of linear layers."""
    if any(layer.kind != "Linear" for layer in chain.layers):
        raise InputError(
            "RGAP recovers one picture from its own gradient, or some of a batch's from a chain of linear layers; this "
            f"gradient is of a batch of {observation.batch_size}, and the model has convolutions. Use a "
            "gradient-matching attack."
        )


def first_layer(observation: Observation, chain: Chain) -> Affine | None:
    """The layer whose units' ratios are examples: a linear one on the input itself, with gradients of weight and bias.

    `None` if there is none, or if a single output lies above it: every unit's `k` is then the same up to a factor, and
    units that share two examples agree as those of one do.
    """
    layer, sent = chain.layers[0], observation.sent
    direct = all(isinstance(step, Reshape) for step in chain.steps[: chain.affine_indices[0]])
    told = layer.bias is not None and layer.weight in sent and bool(sent.get(layer.bias, torch.zeros(1)).any())
    alone = len(chain.layers) > 1 and chain.layers[1].filters < 2
    return layer if direct and told and not alone else None


def examples(weight_gradient: Tensor, bias_gradient: Tensor, count: int) -> Examples:
    """At most `count` examples on which three or more units agree, those with most units first.

    `weight_gradient`: `(F, n)`; `bias_gradient`: `(F,)`.
    """
    alive = bias_gradient.abs() > _DEAD * bias_gradient.abs().max()
    weight_gradient, bias_gradient = weight_gradient[alive], bias_gradient[alive]
    ratios = weight_gradient / bias_gradient[:, None]
    size = torch.linalg.vector_norm(ratios, dim=1)
    agree = torch.cdist(ratios, ratios) <= _SAME * torch.maximum(size[:, None], size)
    left = torch.ones_like(size, dtype=torch.bool)
    exact, units = [], []
    for _ in range(count):
        votes = (agree & left).sum(1) * left
        if not len(votes) or int(votes.max()) < _LEAST:
            break
        group = agree[votes.argmax()] & left
        exact.append(bias_head(weight_gradient[group], bias_gradient[group]).x)
        units.append(int(group.sum()))
        left &= ~group
    rest = bias_head(weight_gradient[left], bias_gradient[left]).x if bool(left.any()) else None
    found = torch.stack(exact) if exact else ratios[:0]
    return Examples(found, torch.tensor(units, dtype=torch.int64), rest)
