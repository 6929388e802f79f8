"""The file that long work goes on from: safetensors, for the owner's eyes, of one computation and no other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.storage.files import atomic_path


class Checkpoint:
    """One file, and when to write it.

    Args:
        path: The file. It holds private data (reconstructions, labels) and is readable by its owner only.

    Raises:
        InputError: `path` is a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(f"`checkpoint` must name a file, and {str(path)!r} is a folder.")
        self._last, self._seconds = time.monotonic(), 0.0

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path.exists()

    def due(self, every: float) -> bool:
        """Whether it is time to write again.

        `every`: least seconds between two writes, negative for always. A write that takes long is made rarer, so that
        writing never takes more than a twentieth of the time.

        Returns:
            Whether the time has come.
        """
        return every < 0 or time.monotonic() - self._last > max(every, 20 * self._seconds)

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write, atomically."""
        begun = time.monotonic()
        write_tensors(self.path, tensors, about)
        self._last = time.monotonic()
        self._seconds = self._last - begun

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was written. Raises `InputError` for a file that no checkpoint is."""
        try:
            return read_tensors(self.path)
        except ValueError as error:
            raise InputError(f"{str(self.path)!r} is no checkpoint of an attack or a survey ({error}).") from error

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        self.path.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and plain data about them, as one private file, atomically."""
    stored = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(stored, temporary, metadata={"about": json.dumps(dict(about))})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. The file is not trusted: nothing in it is executed.

    Returns:
        The tensors, and what was written about them.

    Raises:
        ValueError: The file is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            # A copy lies where torch would put it: the last bit of a product can depend on the alignment.
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(about, dict):
        raise ValueError("it holds no description")
    return tensors, about
