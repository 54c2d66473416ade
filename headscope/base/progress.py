"""A progress bar with an ETA for work that turns out to be long; nothing for work that does not."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

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
        show: False: never. None: only in a terminal or notebook.
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


def _nothing() -> None:
    """Show nothing."""


def _gone() -> None:
    """Show nothing any more."""


def _watched() -> bool:
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _plain_notebook() -> bool:
    # In a notebook rich draws bars with ipywidgets, and warns in the cell where there is none.
    return "ipykernel" in sys.modules and find_spec("ipywidgets") is None


class _Line:
    """Progress as a line of text that a notebook replaces, at most once a second."""

    def __init__(self, description: str, total: float, started: float) -> None:
        self._description, self._total, self._started = description, total, started
        self._shown = 0.0
        show: Any = import_module("IPython.display").display  # with ipykernel it is there
        self._handle = show(self._bundle(0.0), raw=True, display_id=True)

    def _bundle(self, done: float) -> dict[str, str]:
        return {"text/plain": plain_line(self._description, done, self._total, self._elapsed())}

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def update(self, done: float) -> None:
        if self._handle is not None and time.monotonic() - self._shown > 1.0:
            self._shown = time.monotonic()
            self._handle.update(self._bundle(done), raw=True)

    def stop(self) -> None:
        if self._handle is not None:
            said = f"{self._description}: done in {_clock(self._elapsed())}"
            self._handle.update({"text/plain": said}, raw=True)


def plain_line(
    description: str, done: int | float, total: int | float, seconds: int | float
) -> str:
    """Progress in words: share, time so far, and time left at the pace so far."""
    share = min(1.0, done / total) if total > 0 else 0.0
    left = f", {_clock(seconds / share - seconds)} left" if share > 0 else ""
    return f"{description}: {share:.0%} after {_clock(seconds)}{left}"


def _clock(seconds: int | float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _LateBar:
    def __init__(self, total: int | float, description: str) -> None:
        self._total, self._description = total, description
        self._done, self._started = 0.0, time.monotonic()
        self._close: Callable[[], None] = _nothing
        self._update: Callable[[], None] = _nothing

    def advance(self, steps: int | float = 1) -> None:
        self._done += steps
        if self._close is _nothing and time.monotonic() - self._started > _PATIENCE:
            self._open()
        if self._close is not _nothing:
            with suppress(OSError):  # a terminal that is gone must not stop the work
                self._update()

    def _open(self) -> None:
        try:
            self._start()
        except OSError:
            self._close, self._update = _gone, _gone

    def _start(self) -> None:
        if _plain_notebook():
            line = _Line(self._description, float(self._total), self._started)
            self._update = lambda: line.update(self._done)
            self._close = line.stop
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            console=Console(stderr=True),
            transient=True,
        )
        progress.start()
        task = progress.add_task(self._description, total=self._total)
        self._update = lambda: progress.update(task, completed=self._done)
        self._close = progress.stop

    def close(self) -> None:
        with suppress(OSError):
            self._close()
