"""Long attacks: a bar to look at, and a file to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.structures import tree_leaves
from gradguard.storage import checkpoint as files
from gradguard.storage import progress as bars
from gradguard.storage.fingerprint import fingerprint

if TYPE_CHECKING:
    from gradguard.attacks._matching.trials import Trials
    from gradguard.attacks.base import Attack


@contextmanager
def progress_bar(name: str, total: int, shown: bool) -> Iterator[Callable[[int, Tensor], None]]:
    """A function to report to: evaluations done, and the trials' values `(T,)`, whose best is shown."""
    with bars.progress_bar(name, total, shown=shown) as bar:

        def report(done: int, values: Tensor) -> None:
            if bar.shown:  # reading the best back from the device waits for it
                bar.to(done, f"best {float(values.min()):.3g}")

        yield report


class Checkpoint:
    """The file that an attack's state is written to: it belongs to one attack on one problem; another's is refused."""

    def __init__(self, path: Path, attack: Attack, trials: Trials) -> None:
        self.file = files.Checkpoint(path)
        self.fingerprint = _fingerprint(attack, trials)

    def due(self, every: float) -> bool:
        """Whether it is time to write again, at most once in so many seconds."""
        return self.file.due(every)

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Write, atomically."""
        self.file.save(tensors, {"fingerprint": self.fingerprint, "numbers": dict(numbers)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written; `None` if there is no file. Raises `InputError` for a file of another attack."""
        if not self.file.exists:
            return None
        tensors, about = self.file.load()
        if about.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"{str(self.file.path)!r} was written by another attack, or on another gradient or model. Give the "
                "file that belongs to this one, or delete it to start anew."
            )
        return tensors, about["numbers"]

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        self.file.remove()


def _fingerprint(attack: Attack, trials: Trials) -> str:
    """A hash of everything that decides how the attack goes, but for its random numbers."""
    threat = (trials.shape, trials.label_mode, str(trials.observation.local), tuple(trials.sent), trials.free_scale)
    tensors = [*trials.parameters.values(), *trials.function.constants().values(), *trials.sent.values()]
    return fingerprint(
        (attack, *threat), [*tensors, *(part for part in tree_leaves(trials.labels) if part is not None)]
    )
