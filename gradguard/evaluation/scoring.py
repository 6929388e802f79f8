"""Attacks on one batch's gradient, scored against the truth that they never see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguard.attacks import Attack, Observation
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.vectors import Gradient
from gradguard.leakage import count_labels, fidelity, label_recovery
from gradguard.report import AttackScore, LabelScore
from gradguard.threats.model import ThreatModel


def score_attack(
    attack: Attack,
    jacobian: InputJacobian,
    true: Gradient,
    sent: Gradient,
    attacked: Sequence[int],
    *,
    threat: ThreatModel,
    seed: int,
) -> AttackScore | LabelScore:
    """One attack on `sent`, scored against the batch that `jacobian` stands at.

    `true`: the batch's gradient; `sent`: what the attacker sees of it. `attacked`: indices of the examples that are
    attacked, one by one or, where the threat model's attacker does not know the others, together; an attack on labels
    always gets the whole batch, without its labels. An attack that cannot work here is a score with its `failure`.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        if not attack.recovers_inputs:
            return _score_labels(attack, jacobian, sent, threat, generator)
        groups = [[index] for index in attacked] if threat.others_known else [list(attacked)]
        observations = [observe(jacobian, true, sent, group, threat=threat) for group in groups]
        results = [attack(observation, generator=generator) for observation in observations]
    except InputError as error:
        return AttackScore(failure=str(error))
    scores = [
        fidelity(result.inputs, jacobian.inputs[group], value_range=threat.value_range)
        for result, group in zip(results, groups, strict=True)
        if result.inputs is not None
    ]
    return AttackScore(
        psnr=torch.cat([s.psnr for s in scores]).tolist(),
        ssim=torch.cat([s.ssim for s in scores]).tolist(),
        mse=torch.cat([s.mse for s in scores]).tolist(),
        matching_loss=sum(r.matching_loss for r in results) / len(results),
        converged=sum(r.converged for r in results) / len(results),
        seconds=sum(r.seconds for r in results),
        pictures=torch.cat([s.matched for s in scores]).float(),
    )


def observe(
    jacobian: InputJacobian, true: Gradient, sent: Gradient, group: Sequence[int], *, threat: ThreatModel
) -> Observation:
    """What an attacker sees who must find the examples in `group` and knows the rest of the batch."""
    group = list(group)
    part = jacobian.contribution(group)
    function, inputs, targets = part.function, part.inputs, part.rest
    # `sent` less the others' share, in units of the examples' own gradient: that, and all of the noise.
    sent = {n: part.own[n] + (sent[n].to(g) - g) / part.scale for n, g in true.items()}
    classes = None
    if not targets.is_floating_point():
        with torch.no_grad():
            classes = jacobian.gradient.outputs(jacobian.parameters, inputs).shape[1]
    return Observation(
        loss_gradient=function,
        sent=sent,
        input_shape=tuple(inputs.shape[1:]),
        batch_size=len(group),
        labels=targets if threat.labels_known else None,
        num_classes=classes,
        value_range=threat.value_range,
    )


def prior_psnr(inputs: Tensor, attacked: Sequence[int], *, threat: ThreatModel) -> float:
    """dB of a guess that looks at no gradient: the batch's other examples' mean, mid-range for a single one."""
    low, high = threat.value_range
    inputs = inputs.double()
    if len(inputs) > 1:
        guess = (inputs.sum(0) - inputs) / (len(inputs) - 1)
    else:
        guess = torch.full_like(inputs, (low + high) / 2)
    mse = (guess - inputs)[list(attacked)].square().flatten(1).mean(1)
    return (20 * torch.log10(torch.tensor(high - low)) - 10 * torch.log10(mse)).mean().item()


def _score_labels(
    attack: Attack, jacobian: InputJacobian, sent: Gradient, threat: ThreatModel, generator: torch.Generator
) -> AttackScore | LabelScore:
    """An attack on the labels of the whole batch, which it does not get."""
    unknown = ThreatModel(labels_known=False, value_range=threat.value_range)
    observation = observe(jacobian, sent, sent, range(len(jacobian.inputs)), threat=unknown)
    counts = attack(observation, generator=generator).label_counts
    if counts is None:
        return AttackScore(failure="the attack returned no label counts")
    true = count_labels(jacobian.targets, len(counts))
    recovery = label_recovery(counts, true)
    return LabelScore(
        le_acc=recovery.le_acc,
        ln_acc=recovery.ln_acc,
        i_rec=recovery.i_rec,
        recovered=counts.tolist(),
        true=true.tolist(),
    )
