"""Keeping the rounds between two uses of an example: a fixed order in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, SequentialSampler

from gradguard.errors import InputError


class SeparatedSampler:
    """Batches in one order, shuffled once and kept in each epoch: an example comes again after exactly `separation`.

    For `DataLoader(dataset, batch_sampler=SeparatedSampler(...))`. An incomplete last batch is left out.

    Args:
        dataset_size: examples, at least `batch_size`.
        batch_size: examples in a batch.
        generator: of the one shuffle; `None`: the dataset's order.

    Raises:
        InputError: if a number is out of its range.
    """

    def __init__(self, dataset_size: int, batch_size: int, *, generator: torch.Generator | None = None) -> None:
        if not 1 <= batch_size <= dataset_size:
            raise InputError(f"`batch_size` must lie in 1..{dataset_size}, got {batch_size}.")
        self.batch_size = batch_size
        #: Rounds between two uses of one example.
        self.separation = dataset_size // batch_size
        self._order = (
            list(range(dataset_size))
            if generator is None
            else torch.randperm(dataset_size, generator=generator, device=generator.device).tolist()
        )

    def __len__(self) -> int:
        return self.separation

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.separation):
            yield self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


def check_separation(loader: Any, separation: int | None = None) -> int:
    """Refuse a loader that does not keep the rounds between two uses of an example.

    Args:
        loader: a `torch.utils.data.DataLoader`.
        separation: what the schedule was told; default: any.

    Returns:
        The rounds between two uses that the loader keeps.

    Raises:
        InputError: if the loader shuffles or samples anew in each epoch, is not known to keep an order, or comes back
            to an example too soon.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, SeparatedSampler):
        kept = sampler.separation
    elif type(sampler) is BatchSampler and type(sampler.sampler) is SequentialSampler:
        kept = len(sampler)
    else:
        own = getattr(sampler, "sampler", sampler)
        raise InputError(
            f"{type(loader).__name__} with {type(own).__name__} does not keep the order of its examples: one may come "
            "again in the next round, and its noise would not be what the schedule was made for. Use "
            "`DataLoader(dataset, batch_sampler=SeparatedSampler(len(dataset), batch_size))`."
        )
    if separation is not None and kept < separation:
        raise InputError(f"The loader comes back to an example after {kept} rounds; the schedule needs {separation}.")
    return kept
