"""Attacks on one batch's gradient, scored against the truth that they never see."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradguard.attacks import Attack, Observation
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.structures import targets_of
from gradguard.functional.vectors import Gradient
from gradguard.leakage import count_labels, fidelity, label_recovery
from gradguard.report import AttackScore, LabelScore
from gradguard.threats.knowledge import Knowledge
from gradguard.threats.model import ThreatModel


def named(attacks: Sequence[Attack]) -> dict[str, Attack]:
    """Each attack under a name of its own.

    Args:
        attacks: Any, the same one several times too.

    Returns:
        The attacks in their order by name: the class's name where that is the only one, else with the settings that
            differ from the defaults, for instance `DLG(restarts=8)`. Attacks that are the same in all of them are
            numbered.
    """
    count = Counter(attack.name for attack in attacks)
    names = [attack.name if count[attack.name] == 1 else _with_settings(attack) for attack in attacks]
    twins, found = Counter(names), {}
    seen: Counter[str] = Counter()
    for name, attack in zip(names, attacks, strict=True):
        seen[name] += 1
        found[f"{name} #{seen[name]}" if twins[name] > 1 else name] = attack
    return found


def _with_settings(attack: Attack) -> str:
    """The attack's name and the settings that are not the defaults."""
    if not dataclasses.is_dataclass(attack):
        return attack.name
    changed = []
    for setting in dataclasses.fields(attack):
        factory = setting.default_factory
        default = setting.default if factory is dataclasses.MISSING else factory()
        value = getattr(attack, setting.name)
        if setting.repr and (default is dataclasses.MISSING or value != default):
            changed.append(f"{setting.name}={value!r}")
    return f"{attack.name}({', '.join(changed)})" if changed else attack.name


def score_attack(
    attack: Attack,
    jacobian: InputJacobian,
    true: Gradient,
    sent: Gradient,
    attacked: Sequence[int],
    *,
    threat: ThreatModel,
    seed: int,
    knowledge: Knowledge | None = None,
) -> AttackScore | LabelScore:
    """One attack on `sent`, scored against the batch that `jacobian` stands at.

    Args:
        attack: On inputs, or on labels: that one always gets the whole batch, without its labels.
        jacobian: Of the batch.
        true: The batch's gradient, one tensor per parameter.
        sent: What the attacker sees of it. It may lack parameters.
        attacked: Indices of the examples that are attacked, one by one or, where the threat model's attacker does not
            know the others, together.
        threat: What the attacker knows.
        seed: Of the attack's starts.
        knowledge: What the defense declares of `sent`.

    Returns:
        A score on inputs or on labels. An attack that cannot work here, or breaks, is an `AttackScore` with its
            `failure`.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        if not attack.recovers_inputs:
            return _score_labels(attack, jacobian, sent, threat, generator)
        groups = [[index] for index in attacked] if threat.others_known else [list(attacked)]
        observations = [observe(jacobian, true, sent, group, threat=threat, knowledge=knowledge) for group in groups]
        results = [attack(observation, generator=generator) for observation in observations]
        if any(result.inputs is None for result in results):
            return AttackScore(failure="the attack returned no reconstruction")
        value_range = threat.range_of(jacobian.inputs)
        scores = [
            fidelity(result.inputs, jacobian.inputs[group], value_range=value_range)
            for result, group in zip(results, groups, strict=True)
            if result.inputs is not None
        ]
    except InputError as error:
        return AttackScore(failure=str(error))
    except Exception as error:  # an attack of any kind, on any model: its failure is a finding, not the audit's end
        return AttackScore(failure=f"{type(error).__name__}: {error}")
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
    jacobian: InputJacobian,
    true: Gradient,
    sent: Gradient,
    group: Sequence[int],
    *,
    threat: ThreatModel,
    knowledge: Knowledge | None = None,
) -> Observation:
    """What an attacker sees who must find the examples in `group` and knows the rest of the batch.

    Args:
        jacobian: Of the batch.
        true: The batch's gradient, one tensor per parameter.
        sent: What is sent of it.
        group: Indices into the batch.
        threat: Whether the attacker has the labels, and the value range.
        knowledge: What the defense declares of `sent`; the observation's is in the units of the examples' own gradient.

    Returns:
        The observation. Its gradient is `sent` less the others' share, in units of the group's own gradient: all of the
            noise is in it.
    """
    group = list(group)
    part = jacobian.contribution(group)
    function, inputs, targets = part.function, part.inputs, part.rest
    # `sent` less the others' share, in units of the examples' own gradient: that, and all of the noise.
    sent = {n: part.own[n] + (sent[n].to(g) - g) / part.scale for n, g in true.items() if n in sent}
    labels, classes = targets_of(targets), None
    if labels is not None and not labels.is_floating_point():
        with torch.no_grad():
            outputs = function.outputs(jacobian.parameters, inputs, targets)
        classes = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim > 1 else None
    return Observation(
        loss_gradient=function,
        sent=sent,
        input_shape=tuple(inputs.shape[1:]),
        batch_size=len(group),
        labels=targets if threat.labels_known else None,
        num_classes=classes,
        value_range=threat.value_range,
        knowledge=None if knowledge is None else _of_examples(knowledge, jacobian.inputs, group, part.scale),
        offset=None
        if knowledge is None or len(group) == len(jacobian.inputs)
        else {n: g / part.scale - part.own[n] for n, g in true.items() if n in sent},
    )


def _of_examples(knowledge: Knowledge, inputs: Tensor, group: list[int], scale: float) -> Knowledge:
    """What is known of the message of a batch, for some of its examples, whose own gradient has the weight `scale`.

    What displacements of the other examples do to the message is not counted as noise, so that an attack trusts it more
    than it should: it may do worse for that, never better than it could.

    Args:
        knowledge: Of the batch's message.
        inputs: Of the whole batch.
        group: The examples' indices.
        scale: Their weight in the message.

    Returns:
        The declaration in the units of the examples' own gradient.
    """
    known = knowledge.scaled(1 / scale)
    whole = knowledge.displacement
    if whole is None or len(group) == len(inputs):
        return known

    def displacement(u: Tensor) -> Tensor:
        rows = torch.zeros(len(inputs), *u.shape[1:], dtype=u.dtype, device=u.device)
        rows[group] = u
        return whole(rows)[group]

    return replace(known, displacement=displacement)


def guess_psnr(inputs: Tensor, attacked: Sequence[int], *, threat: ThreatModel) -> list[float]:
    """The PSNR of the best guess that looks at no gradient: the mean of the batch's other examples, or mid-range.

    Args:
        inputs: `(B, *input_shape)`.
        attacked: Indices of examples.
        threat: Its value range is the PSNR's.

    Returns:
        dB per attacked example, of whichever guess is closer to it.
    """
    low, high = threat.range_of(inputs)
    inputs = inputs.double()
    guesses = [torch.full_like(inputs, (low + high) / 2)]
    if len(inputs) > 1:
        guesses.append((inputs.sum(0) - inputs) / (len(inputs) - 1))
    errors = torch.stack([(guess - inputs).square().reshape(len(inputs), -1).mean(1) for guess in guesses])
    mse = errors.min(0).values[list(attacked)].clamp_min(torch.finfo(torch.float64).tiny)
    return (20 * math.log10(high - low) - 10 * torch.log10(mse)).tolist()


def prior_psnr(inputs: Tensor, attacked: Sequence[int], *, threat: ThreatModel) -> float:
    """dB of the best guess that looks at no gradient, mean over the attacked examples: see `guess_psnr`."""
    guesses = guess_psnr(inputs, attacked, threat=threat)
    return sum(guesses) / len(guesses)


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
