"""Run options: batch size, memory limit, seed and progress."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch

from headscope.errors import InputError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
# A chunk much larger than the processor's caches is slower, not faster; a GPU wants more.
_CPU_CHUNK = 32 * 2**20
_GPU_CHUNK = 512 * 2**20
_SHARE = 0.25


def parse_memory(amount: "str | int | None") -> int | None:
    """Bytes of ``"2GB"``, ``"512 MiB"`` or a number; None stays None.

    Raises:
        InputError: if it is not an amount.
    """
    if amount is None:
        return None
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", amount.upper())
        unit = match.group(2) if match else None
        if match is None or unit not in _UNITS:
            raise InputError(
                f"{amount!r} is not an amount of memory: write it as '2GB' or '512MB'."
            )
        amount = int(float(match.group(1)) * _UNITS[unit])
    if amount <= 0:
        raise InputError("the memory for a chunk must be more than nothing.")
    return amount


def chunk_bytes(device: torch.device, limit: int | None) -> int:
    """Size limit of one chunk of rows in bytes.

    The limit where it is given; else what the device works through fastest, and on a GPU never
    more than a quarter of what is free.
    """
    if limit is not None:
        return limit
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(_GPU_CHUNK, _SHARE * free))
    return _CPU_CHUNK


def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory for the next tensors.

    glibc hands freed blocks back to the system above a size that it learns from what was freed,
    32 MB at most (mallopt(3), M_MMAP_THRESHOLD). Until it has met a large block, activations are
    mapped anew in every layer, at the cost of a page fault for every 4 kB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # never touched, so it costs nothing


def free_cached_memory() -> None:
    """Release a GPU's cached blocks after a failed allocation.

    Outside of the ``except`` block: inside it the traceback still holds the tensors.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a GPU or on the CPU (a RuntimeError in torch)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


# Seconds of work before a bar appears.
_PATIENCE = 2.0


@runtime_checkable
class Advance(Protocol):
    """Callback with the number of steps just finished."""

    def __call__(self, steps: int | float = 1) -> None:
        """Count steps."""


@contextmanager
def track(total: int | float, description: str, *, show: bool | None = None) -> Iterator[Advance]:
    """Show a progress bar on stderr once the work has taken two seconds.

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
    """Ignore steps."""


def _nothing() -> None:
    """Display nothing."""


def _gone() -> None:
    """Stop displaying."""


def _watched() -> bool:
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _plain_notebook() -> bool:
    # In a notebook rich draws bars with ipywidgets, and warns in the cell if there is none.
    return "ipykernel" in sys.modules and find_spec("ipywidgets") is None


class _Line:
    """Progress as a text line that a notebook replaces, at most once a second."""

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
    """Progress as text: share, elapsed time, and remaining time at this pace."""
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


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, validated once and passed on as one value.

    Attributes:
        batch_size: examples per pass; None: as many as the measurement finds suitable. Affects only
            time and memory.
        memory: bytes that a chunk or a stack may take, or a text such as ``"2GB"``; None: what
            suits the device.
        seed: seed for all sampling; 0 or more.
        progress: show a progress bar. None: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if a value is of the wrong kind or out of range.

    Example:
        >>> RunOptions(memory="2KB").memory_bytes, RunOptions(batch_size=4).per_pass(100, 8192)
        (2000, 4)
    """

    batch_size: int | None = None
    memory: str | int | None = None
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        """Validate every option."""
        size, seed = self.batch_size, self.seed
        if size is not None and not _is_integer(size):
            raise InputError(f"batch_size={size!r} is not a number of examples: give 1 or more.")
        if size is not None and size < 1:
            raise InputError(f"batch_size={size}: give 1 or more.")
        if not _is_integer(seed) or seed < 0:
            raise InputError(f"seed={seed!r} is not a seed: give a whole number from 0 on.")
        if self.progress not in (None, True, False):
            raise InputError(f"progress={self.progress!r}: give True, False or None.")
        parse_memory(self.memory)

    @property
    def memory_bytes(self) -> int | None:
        """Memory limit in bytes; None: what suits the device."""
        return parse_memory(self.memory)

    @property
    def quiet(self) -> "RunOptions":
        """The same options without a bar, for parts of a run that show their own."""
        return replace(self, progress=False)

    def per_pass(self, length: int, tokens: int) -> int:
        """Examples per pass: the batch size, or as many as have about ``tokens`` tokens.

        Args:
            length: tokens of one example.
            tokens: number of tokens per pass.
        """
        return self.batch_size or max(1, tokens // length)

    def track(self, total: int | float, description: str) -> AbstractContextManager[Advance]:
        """Show a progress bar, if enabled."""
        return track(total, description, show=self.progress)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
