"""All attacks by name, with what each needs: read by the command line, the tests and the documentation.

An attack of your own joins them with a decorator:

    @register_attack("mine", needs="a first layer that is linear", quick={"iterations": 5})
    @dataclass(frozen=True, kw_only=True)
    class Mine(Attack): ...

`gradguard.testing.check_attack` then says whether it keeps what every attack promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gradguard.attacks._matching.engine import GradientMatching
from gradguard.attacks.base import Attack
from gradguard.attacks.dlg import DLG, IDLG
from gradguard.attacks.grad_inversion import GradInversion
from gradguard.attacks.hgap import HGAP
from gradguard.attacks.ilrg import ILRG, IDLGLabel, LabelSystem
from gradguard.attacks.inverting_gradients import InvertingGradients
from gradguard.attacks.rgap import RGAP
from gradguard.attacks.second_order import LevenbergMarquardt
from gradguard.attacks.spear import SPEAR
from gradguard.errors import InputError

AnyAttack = TypeVar("AnyAttack", bound=type[Attack])


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """An attack in the registry.

    `name`: in options and tables, lower case. `attack`: the class. `needs`: of model and observation, one phrase.
    `quick`: options under which it ends within a second on a small model, for tests.
    """

    name: str
    attack: type[Attack]
    needs: str
    quick: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recovers(self) -> str:
        """What comes back: "inputs" (and labels) or "labels"."""
        return "inputs" if self.attack.recovers_inputs else "labels"

    @property
    def summary(self) -> str:
        """The first line of the class's documentation: the source."""
        return (self.attack.__doc__ or "").strip().split("\n")[0]

    def make(self, *, quick: bool = False) -> Attack:
        """The attack with its default options, or the quick ones."""
        return self.attack(**(self.quick if quick else {}))


#: Every attack by name.
ATTACKS: dict[str, AttackEntry] = {}


def register_attack(
    name: str, *, needs: str, quick: Mapping[str, Any] | None = None
) -> Callable[[AnyAttack], AnyAttack]:
    """A class decorator that adds an attack to `ATTACKS`.

    Args:
        name: a new name, lower case.
        needs: what model and observation must have, one phrase for tables.
        quick: options under which the attack ends within a second on a small model.

    Returns:
        The decorator, which returns the class as it is.

    Raises:
        InputError: for a name that another class has, and for what is no attack.
    """

    def register(attack: AnyAttack) -> AnyAttack:
        if not (isinstance(attack, type) and issubclass(attack, Attack)):
            raise InputError(f"Only subclasses of `Attack` can be registered, got {attack!r}.")
        other = ATTACKS.get(name)
        if other is not None and other.attack.__qualname__ != attack.__qualname__:
            raise InputError(f"There is an attack {name!r} already, {other.attack.__name__}. Take another name.")
        ATTACKS[name] = AttackEntry(name=name, attack=attack, needs=needs, quick=dict(quick or {}))
        return attack

    return register


_HEAD = "a Linear head under a mean cross-entropy"
_SHORT = {"restarts": 1, "evaluations": 5, "polish": 1}
_STEPS = {"restarts": 1, "iterations": 5}
for _name, _attack, _needs, _quick in (
    ("dlg", DLG, "a twice differentiable model; `num_classes` without labels", _SHORT),
    ("idlg", IDLG, f"a twice differentiable model; without labels {_HEAD}", _SHORT),
    ("ig", InvertingGradients, f"a twice differentiable model; without labels {_HEAD}", _STEPS),
    ("gradinversion", GradInversion, f"BatchNorm with running statistics; without labels {_HEAD}", _STEPS),
    ("lm", LevenbergMarquardt, f"a smooth model; without labels {_HEAD}", {"restarts": 1, "iterations": 2}),
    (
        "matching",
        GradientMatching,
        f"a twice differentiable model; without labels {_HEAD}",
        {"restarts": 1, "max_seconds": 0.2},
    ),
    ("rgap", RGAP, "a chain of layers that can be undone; batches on fully connected ReLU networks", {}),
    ("hgap", HGAP, "a chain of layers that can be undone; a single example, but for fully connected ReLU networks", {}),
    ("spear", SPEAR, "a first Linear layer with ReLU behind it, wider than the batch", {"max_samples": 2000}),
    ("ilrg", ILRG, f"{_HEAD}, with a bias", {}),
    ("labels", LabelSystem, _HEAD, {"rounds": 2}),
    ("idlg-label", IDLGLabel, f"a single example; {_HEAD}", {}),
):
    register_attack(_name, needs=_needs, quick=_quick)(_attack)
