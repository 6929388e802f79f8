"""What identifies a computation: hashes of tensors, of modules and of examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def plain_repr(thing: Any) -> str:
    """`repr` without addresses in memory, the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def fingerprint(thing: Any, tensors: Iterable[Tensor] = ()) -> str:
    """16 hexadecimal digits of a hash of `thing` and of `tensors`.

    Of a module: its structure, settings, parameters and buffers. Of anything else: its `repr`.

    Returns:
        The digits.
    """
    hashed = hashlib.blake2b(plain_repr(thing).encode(), digest_size=8)
    if isinstance(thing, nn.Module):
        for name, module in thing.named_modules():
            # What a repr leaves out: `label_smoothing`, for instance. `training` is covered by the train mode.
            settings = {n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
            settings.pop("training", None)
            hashed.update(f"{name} {sorted(settings.items())}".encode())
        for name, tensor in sorted(chain(thing.named_parameters(), thing.named_buffers()), key=lambda pair: pair[0]):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
            hashed.update(_bytes(tensor.detach().reshape(1, -1))[0])
    for tensor in tensors:
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(_bytes(tensor.detach().reshape(1, -1))[0])
    return hashed.hexdigest()


def example_digests(*columns: Tensor) -> Tensor:
    """`(B,)` int64: a hash of each example's input and target, or of whatever `(B, ...)` belongs to it."""
    rows = zip(*(_bytes(part.detach().reshape(len(part), -1)) for part in columns), strict=True)
    hashes = [hashlib.blake2b(b"".join(row), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(hashes), dtype="<i8").astype(np.int64))


def _bytes(rows: Tensor) -> list[bytes]:
    """Each row's memory; through uint8, since NumPy has no bfloat16."""
    return [row.tobytes() for row in rows.cpu().contiguous().view(torch.uint8).numpy()]
