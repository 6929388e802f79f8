"""Files that hold private or untrusted data: written atomically, readable by their owner, never pickled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from gradguard.errors import InputError


@contextmanager
def atomic_path(path: str | Path, *, private: bool = True) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place only if the block ends well.

    Args:
        path: Where the file is to be. Missing folders are made.
        private: Readable and writable by the owner alone (mode 0600), for gradients and reconstructions; else mode
            0644.

    Yields:
        The temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o600 if private else 0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, *, private: bool = True) -> None:
    """Write a text file atomically.

    Args:
        path: Where the file is to be.
        text: Its text, written as UTF-8.
        private: As in `atomic_path`.
    """
    with atomic_path(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_gradient(path: str | Path, gradient: Mapping[str, Tensor]) -> None:
    """Write a gradient as safetensors, readable by the owner alone.

    Args:
        path: Where the file is to be.
        gradient: One tensor per parameter, keyed as `named_parameters()`.
    """
    tensors = {n: g.detach().cpu().contiguous() for n, g in gradient.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)


def load_gradient(path: str | Path) -> dict[str, Tensor]:
    """Read a gradient that `save_gradient` wrote. A gradient file is untrusted: nothing in it is executed.

    Args:
        path: A safetensors file.

    Returns:
        The tensors by their names, on the CPU.

    Raises:
        InputError: If there is no such file, or it is not safetensors (a pickle, for instance).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no gradient file {str(path)!r}.")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{str(path)!r} is not a safetensors file ({error}). gradguard reads no pickles, since a gradient file is "
            "untrusted input; write it with `gradguard.save_gradient` or `safetensors.torch.save_file`."
        ) from error


def load_weights(path: str | Path, model: nn.Module) -> None:
    """Load a model's parameters and buffers from safetensors, in place; every name must match.

    Args:
        path: A safetensors file.
        model: The model whose weights are replaced.

    Raises:
        InputError: If the file is not safetensors or does not fit the model.
    """
    tensors = load_gradient(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"The weights in {str(path)!r} do not fit the model: {error}") from error
