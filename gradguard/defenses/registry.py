"""All defenses by name, with the option that is their strength: for the command line, the tests and the documentation.

A defense of your own joins them with a decorator:

    @register_defense("mine", strength="noise_ratio")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Defense): ...

`gradguard.testing.check_defense` then says whether it keeps what every defense promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from gradguard.defenses.base import Defense
from gradguard.defenses.directional import PriorAwareNoise, PriorNoise, SmallEigenspaceNoise
from gradguard.defenses.gaussian import GaussianNoise
from gradguard.defenses.transforms import Pruning, Quantisation, RandomPruning, Sign, Soteria
from gradguard.errors import InputError

AnyDefense = TypeVar("AnyDefense", bound=type[Defense])


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """A defense in the registry.

    `name`: in options and tables, lower case. `defense`: the class. `strength`: the option that says how
    strong; `None` where none takes any number in (0, 1) (signs, bits).
    """

    name: str
    defense: type[Defense]
    strength: str | None

    @property
    def summary(self) -> str:
        """The first line of the class's documentation."""
        return (self.defense.__doc__ or "").strip().split("\n")[0]

    def make(self, strength: float) -> Defense:
        """The defense at a strength; one without takes its defaults."""
        if self.strength is None:
            return self.defense()
        return self.defense(**{self.strength: strength})


#: Every defense by name.
DEFENSES: dict[str, DefenseEntry] = {}


def register_defense(name: str, *, strength: str | None) -> Callable[[AnyDefense], AnyDefense]:
    """A class decorator that adds a defense to `DEFENSES`.

    Args:
        name: a new name, lower case.
        strength: the name of the class's option that says how strong it is; `None` if no option takes shares.

    Returns:
        The decorator, which returns the class as it is.

    Raises:
        InputError: for a name that another class has, for what is no defense, and for an option that it has not.
    """

    def register(defense: AnyDefense) -> AnyDefense:
        if not (isinstance(defense, type) and issubclass(defense, Defense)):
            raise InputError(f"Only subclasses of `Defense` can be registered, got {defense!r}.")
        if strength is not None and strength not in {f.name for f in fields(defense)}:
            raise InputError(f"{defense.__name__} has no option {strength!r}: name the one that is its strength.")
        other = DEFENSES.get(name)
        if other is not None and other.defense.__qualname__ != defense.__qualname__:
            raise InputError(f"There is a defense {name!r} already, {other.defense.__name__}. Take another name.")
        DEFENSES[name] = DefenseEntry(name=name, defense=defense, strength=strength)
        return defense

    return register


register_defense("gaussian", strength="noise_ratio")(GaussianNoise)
register_defense("prior", strength="noise_ratio")(PriorNoise)
register_defense("prior-aware", strength="noise_ratio")(PriorAwareNoise)
register_defense("small-eigenspace", strength="noise_ratio")(SmallEigenspaceNoise)
register_defense("pruning", strength="fraction")(Pruning)
register_defense("random-pruning", strength="fraction")(RandomPruning)
register_defense("sign", strength=None)(Sign)
register_defense("quantisation", strength=None)(Quantisation)
register_defense("soteria", strength="fraction")(Soteria)
