"""Labels that attacks on inputs are held to where the observation has none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradguard.attacks._labels.classification_head import ClassificationHead, observed_head
from gradguard.attacks._labels.counts import idlg_label, labels_of, sparsified
from gradguard.attacks._labels.scale import free_scale_label, solve_system_and_scale
from gradguard.attacks._labels.system import SystemCounts, solve_label_system
from gradguard.threats.observation import Observation


def infer_labels(observation: Observation) -> Tensor:
    """The labels of an observation's batch, `(B,)` int64 in ascending order.

    Of one example iDLG's; of more iLRG's where they explain the head's gradient, else those of `solve_label_system`. A
    client's mean gradient over several steps is taken as one of its batch at the head in the middle of its way, which
    is exact to first order in the learning rate. Raises what `observed_head` raises.
    """
    head = observed_head(observation, needs_bias=False)
    sent = observation.sent
    if observation.batch_size == 1:
        tell = idlg_label if observation.scale is not None else free_scale_label
        return tell(sent[head.weight], sent[head.bias] if head.bias is not None else None)[None]
    # What local steps add, or sparsification took away, the system's equations know nothing of.
    trust = math.inf if observation.local is not None or sparsified(sent[head.weight]) else 0.05
    return labels_of(solve_observed_system(observation, head, trust=trust)[0].counts)


def solve_observed_system(
    observation: Observation,
    head: ClassificationHead,
    *,
    trust: float = 0.05,
    rounds: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[SystemCounts, float, bool]:
    """`solve_label_system` on an observation's head; the factor of its gradient, and whether that is certain."""
    sent = observation.sent
    # A frozen bias sends no gradient, but the server knows it.
    known = dict(observation.loss_gradient.model.named_parameters()).get(f"{head.weight[: -len('weight')]}bias")
    weight, bias = (_halfway(observation, name) for name in (head.weight, head.bias))
    assert weight is not None, "a head has a weight"
    tensors = (sent[head.weight], sent[head.bias] if head.bias is not None else None, weight)
    bias = bias if bias is not None or known is None else known.detach().to(weight)
    solve = solve_label_system if observation.scale is not None else solve_system_and_scale
    found = solve(
        *tensors,
        bias,
        observation.batch_size,
        nonnegative=head.nonnegative,
        trust=trust,
        rounds=rounds,
        generator=generator,
    )
    return (found, 1.0, True) if isinstance(found, SystemCounts) else found


def _halfway(observation: Observation, name: str | None) -> Tensor | None:
    """The parameter `name` as it was on the average of the client's steps."""
    if name is None:
        return None
    parameter = observation.loss_gradient.parameters()[name]
    if observation.local is None or observation.scale is None:
        return parameter  # how long the way is, an unknown factor hides
    way = observation.local.learning_rate * observation.local.steps
    return parameter - way / 2 * observation.sent[name].to(parameter)
