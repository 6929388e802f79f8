"""How many CPU threads a computation of many small steps gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside; the caller's number is put back.

    A small network's product takes microseconds to milliseconds. Threads gain nothing on it, and where other processes
    keep the cores busy they wait for each other at every product.

    Yields:
        Nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
