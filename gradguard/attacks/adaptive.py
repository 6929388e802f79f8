"""Adaptive attacks, built from what a defense declares (`Knowledge`): a defender cannot choose a weak attacker.

Attacks that match gradients use the declaration themselves once they are told to (`adaptive=True`). For declared noise
there are two of their own, `MAP` and `WienerFilter`. All read it from the observation: `Observation(knowledge=...)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gradguard.attacks._matching.distances import SquaredDistance
from gradguard.attacks._matching.engine import MatchingAttack
from gradguard.attacks.base import Attack
from gradguard.attacks.dlg import DLG
from gradguard.attacks.posterior import MAP, WienerFilter
from gradguard.threats.knowledge import Knowledge

__all__ = ["MAP", "WienerFilter", "adaptive", "adaptive_attacks"]


def adaptive(attack: Attack, knowledge: Knowledge) -> Attack | None:
    """`attack` as someone would run it who knows the defense.

    Args:
        attack: any.
        knowledge: what the defense declares of the message.

    Returns:
        The attack that uses it, for observations that carry the declaration (`Observation(knowledge=...)`). `None`
        where the attack cannot use it, or nothing in it would change the attack.
    """
    if not isinstance(attack, MatchingAttack) or attack.adaptive or not _changes_matching(attack, knowledge):
        return None
    return replace(attack, adaptive=True)


def adaptive_attacks(knowledge: Knowledge, attacks: Sequence[Attack], *, prior: Any = None) -> list[Attack]:
    """The attacks that a defense's declaration calls for, to be run beside plain ones.

    Args:
        knowledge: what the defense declares of the message.
        attacks: the plain ones. Without one on the inputs nothing is added.
        prior: what inputs look like, for declared noise; see `MAP`.

    Returns:
        Those of `attacks` that can use the declaration, adaptive; and for declared noise `MAP` (noise on the gradient)
        or `WienerFilter` (displacements). Empty where nothing is declared that an attack could use.
    """
    found: list[Attack] = []
    for attack in attacks:
        one = adaptive(attack, knowledge)
        if one is not None and one not in found:
            found.append(one)
    if not any(attack.recovers_inputs for attack in attacks) or knowledge.scale is None:
        return found
    if _has_variance(knowledge):
        found.append(MAP(prior=prior))
    if knowledge.displacement is not None:
        matching = [a for a in (*found, *attacks) if isinstance(a, MatchingAttack)]
        found.append(WienerFilter(attack=matching[0] if matching else DLG(), prior=prior))
    return found


def _changes_matching(attack: MatchingAttack, knowledge: Knowledge) -> bool:
    masked = knowledge.mask is not None and any(not bool(m.all()) for m in knowledge.mask.values())
    weighed = isinstance(attack.distance, SquaredDistance) and _is_uneven(knowledge)
    return masked or weighed or bool(knowledge.transforms or knowledge.left_out) or knowledge.scale != 1.0


def _has_variance(knowledge: Knowledge) -> bool:
    variance = knowledge.variance
    if variance is None:
        return False
    values = list(variance.values()) if isinstance(variance, Mapping) else [variance]
    return any(bool((torch.as_tensor(v) > 0).any()) for v in values)


def _is_uneven(knowledge: Knowledge) -> bool:
    """Whether noise differs over elements by more than its estimate from one draw would."""
    if not isinstance(knowledge.variance, Mapping) or knowledge.transforms:
        return False
    values = [torch.as_tensor(v) for v in knowledge.variance.values()]
    least = min((v.min().item() for v in values if v.numel()), default=0.0)
    largest = max((v.max().item() for v in values if v.numel()), default=0.0)
    return largest > 0 and least < 0.5 * largest
