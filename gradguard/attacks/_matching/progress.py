"""Long attacks: a bar to look at, and a file to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.storage.files import atomic_path

if TYPE_CHECKING:
    from gradguard.attacks._matching.trials import Trials
    from gradguard.attacks.base import Attack


@contextmanager
def progress_bar(name: str, total: int, shown: bool) -> Iterator[Callable[[int, Tensor], None]]:
    """A function to report to: evaluations done, and the trials' values `(T,)`, whose best is shown."""
    if not shown:
        yield lambda done, values: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("best {task.fields[best]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total, best="-")

        def report(done: int, values: Tensor) -> None:
            progress.update(task, completed=done, best=f"{float(values.min()):.3g}")

        yield report


class Checkpoint:
    """The file that an attack's state is written to: safetensors, for the owner's eyes (it holds reconstructions).

    It belongs to one attack on one problem; another's is refused.
    """

    def __init__(self, path: Path, attack: Attack, trials: Trials) -> None:
        if path.is_dir():
            raise InputError(f"`checkpoint` must name a file, and {str(path)!r} is a folder.")
        self.path = path
        self.fingerprint = _fingerprint(attack, trials)

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Write, atomically."""
        stored = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        metadata = {"fingerprint": self.fingerprint, "numbers": json.dumps(dict(numbers))}
        with atomic_path(self.path) as temporary:
            safetensors.torch.save_file(stored, temporary, metadata=metadata)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written; `None` if there is no file. Raises `InputError` for a file of another attack."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                # A copy lies where torch would put it: the last bit of a product can depend on the alignment.
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118  # it is no dictionary
        except safetensors.SafetensorError as error:
            raise InputError(f"{str(self.path)!r} is no checkpoint of an attack ({error}).") from error
        if metadata.get("fingerprint") != self.fingerprint:
            raise InputError(
                f"{str(self.path)!r} was written by another attack, or on another gradient or model. Give the file "
                "that belongs to this one, or delete it to start anew."
            )
        return tensors, json.loads(metadata["numbers"])

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        self.path.unlink(missing_ok=True)


def _fingerprint(attack: Attack, trials: Trials) -> str:
    """A hash of everything that decides how the attack goes, but for its random numbers."""
    threat = (trials.shape, trials.label_mode, str(trials.observation.local), tuple(trials.sent), trials.free_scale)
    digest = hashlib.sha256(repr((attack, *threat)).encode())
    tensors = [*trials.parameters.values(), *trials.function.constants().values(), *trials.sent.values()]
    for tensor in [*tensors, *([] if trials.labels is None else [trials.labels])]:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
