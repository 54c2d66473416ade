"""A progress bar with an ETA for work that turns out to be long; nothing for work that does not."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

# Seconds of work before a bar appears.
_PATIENCE = 2.0


@runtime_checkable
class Advance(Protocol):
    """Call with the number of steps just done."""

    def __call__(self, steps: int | float = 1) -> None:
        """Count steps."""


@contextmanager
def track(total: int | float, description: str, *, show: bool | None = None) -> Iterator[Advance]:
    """Show a bar on stderr once the work has taken two seconds.

    Args:
        total: steps in all.
        description: what is being done.
        show: False for never; None for only where a person looks on (a terminal or notebook).
    """
    if show is False or (show is None and not _watched()):
        yield _silent
        return
    bar = _LateBar(total, description)
    try:
        yield bar.advance
    finally:
        bar.close()


def _silent(steps: int | float = 1) -> None:
    """Count nothing."""


def _watched() -> bool:
    # In a notebook rich draws bars with ipywidgets, and warns in the cell where there is none.
    notebook = "ipykernel" in sys.modules and find_spec("ipywidgets") is not None
    return sys.stderr.isatty() or notebook


class _LateBar:
    def __init__(self, total: int | float, description: str) -> None:
        self._total, self._description = total, description
        self._done, self._started = 0.0, time.monotonic()
        self._close = _silent

    def advance(self, steps: int | float = 1) -> None:
        self._done += steps
        if self._close is _silent and time.monotonic() - self._started > _PATIENCE:
            self._open()
        if self._close is not _silent:
            self._progress.update(self._task, completed=self._done)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(self._description, total=self._total)
        self._close = lambda steps=1: self._progress.stop()

    def close(self) -> None:
        self._close()
