"""R-GAP on a batch: the examples that a first linear layer with a bias gives away one by one, and a combination.

The gradient of a linear layer is `sum_r k_r x_r^T`, of rank one for one example only, so the recursion on a batch gives
a combination of its examples (Zhu & Blaschko 2021, section 3). A unit that one example alone activates (ReLU) still has
that example's rank-one row: `grad W_i / grad b_i = x_r`, exactly. Those of one example all have the same ratio. Mixed
ones have each their own if the signals of the examples differ in direction, and one in common if they do not, so a
group that agrees is a candidate, and `batch_proof` says which candidates are examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.attacks._closed_form.batch_proof import BatchProof
from gradguard.attacks._closed_form.heads import bias_head
from gradguard.chain import Activation, Affine, Chain, Reshape, Rewire
from gradguard.errors import InputError
from gradguard.threats.observation import Observation

#: Relative distance up to which two units' ratios are the same: rounding of float32, some times over.
_SAME = 1e-5
#: Fewest units that must agree. Of some hundred that share two examples, two come as near to each other by chance.
_LEAST = 3
#: Bias gradients below this, relative to the largest, are rounding.
_DEAD = 1e-6
#: Relative mismatch of a whole batch, as a share of the relative change of the loss's derivative.
_CURVED = 1e-5


@dataclass(frozen=True)
class Examples:
    """What a first layer gives away. `candidates`: `(m, n)`; `groups`: the units that agree on each, bool `(m, F)`.

    `combination`: `(n,)`, what explains the gradient of the other units best; `None` if no unit is left.
    """

    candidates: Tensor
    groups: Tensor
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
    """The layer whose units' ratios may be examples: a linear one on the inputs, with gradients of weight and bias.

    Behind it must come a ReLU, or no unit is ever one example's alone.
    """
    layer, sent = chain.layers[0], observation.sent
    told = layer.bias is not None and layer.weight in sent and bool(sent.get(layer.bias, torch.zeros(1)).any())
    after = next((s for s in chain.steps[chain.affine_indices[0] + 1 :] if not isinstance(s, Reshape | Rewire)), None)
    alone = isinstance(after, Activation) and bool(after.flat)
    return layer if chain.moves and told and alone else None


def examples(weight_gradient: Tensor, bias_gradient: Tensor, count: int) -> Examples:
    """At most `count` candidates on which three or more units agree, those with most units first.

    `weight_gradient`: `(F, n)`; `bias_gradient`: `(F,)`.
    """
    alive = bias_gradient.abs() > _DEAD * bias_gradient.abs().max()
    ratios = weight_gradient / torch.where(alive, bias_gradient, 1.0)[:, None]
    size = torch.linalg.vector_norm(ratios, dim=1)
    agree = (torch.cdist(ratios, ratios) <= _SAME * torch.maximum(size[:, None], size)) & alive
    left = alive.clone()
    found, groups = [], []
    for _ in range(count):
        votes = (agree & left).sum(1) * left
        if int(votes.max()) < _LEAST:
            break
        group = agree[votes.argmax()] & left
        found.append(bias_head(weight_gradient[group], bias_gradient[group]).x)
        groups.append(group)
        left &= ~group
    rest = bias_head(weight_gradient[left], bias_gradient[left]).x if bool(left.any()) else None
    candidates, members = (torch.stack(found), torch.stack(groups)) if found else (ratios[:0], left[None][:0])
    return Examples(candidates, members, rest)


@dataclass(frozen=True)
class Recovered:
    """Candidates, those that are proved first. `proved`: how many; `units`: as many per candidate, int64 `(m,)`.

    `labels`: of the whole batch, if all of it is proved.
    """

    inputs: Tensor
    proved: int
    units: Tensor
    labels: Tensor | None


def recovered(observation: Observation, chain: Chain, found: Examples) -> Recovered:
    """What `found` proves of a batch whose first layer is as `first_layer` asks."""
    proof = BatchProof(observation, chain, chain.affine_indices[0])
    sent = proof.observation.sent
    weight, bias = sent[proof.layer.weight], sent[str(proof.layer.bias)]
    explained = [proof.explained(x, group, bias) for x, group in zip(found.candidates, found.groups, strict=True)]
    count, units = observation.batch_size, found.groups.sum(1)
    if len(explained) == count and proof.targets is not None:
        inputs = chain.undone(found.candidates)
        labels = proof.targets[torch.tensor([e.label for e in explained], device=bias.device)]
        rank = proof.rank(torch.cat([weight, bias[:, None]], dim=1))
        alike = proof.labels is None or torch.equal(_sorted(labels), _sorted(proof.labels))
        # In a flat head a mixture is off by little more than the head is curved.
        most = min(proof.rounding, (_CURVED * min(e.change for e in explained)) ** 2)
        if rank == count and alike and proof.observation.matching_loss(inputs, labels) <= most:
            return Recovered(found.candidates, count, units, labels)
    order = sorted(range(len(explained)), key=lambda i: not explained[i].proved)
    return Recovered(found.candidates[order], sum(e.proved for e in explained), units[order], None)


def _sorted(labels: Tensor) -> Tensor:
    """The rows of `labels` in an order that does not depend on theirs."""
    rows = labels.reshape(len(labels), -1)
    values, places = torch.unique(rows, dim=0, return_inverse=True)
    return values[places.sort().values]
