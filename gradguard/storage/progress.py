"""One progress bar for audits, surveys and attacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar to report to; one that is not shown takes reports and does nothing."""

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress, self._task = progress, task

    def to(self, done: int, note: str = "") -> None:
        """`done` of the total are done. `note`: what to say beside it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)

    def step(self, description: str) -> None:
        """One more begins: `description` says what."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=description)

    @property
    def shown(self) -> bool:
        """Whether anybody sees it; numbers that only the bar needs are not to be read off a device otherwise."""
        return self._progress is not None


@contextmanager
def progress_bar(description: str, total: int | None, *, shown: bool | None = None) -> Iterator[Bar]:
    """A progress bar.

    Args:
        description: What is being done.
        total: Of how many; `None` if that is not known.
        shown: `None` and `True`-where-possible uses (audits, surveys) draw on standard error, only if that is a
            terminal, and leave nothing behind. `True` draws on standard output whatever that is, as it was asked for by
            name. `False` draws nothing.

    Yields:
        The bar.
    """
    if shown is False:
        yield Bar()
        return

    console = Console() if shown else Console(stderr=True)
    if not shown and not console.is_terminal:
        yield Bar()
        return
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=not shown) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))
