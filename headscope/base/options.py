"""How a measurement is run: what changes its time, its memory and what it draws."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Integral

from headscope.base.memory import parse_memory
from headscope.base.progress import Advance, track
from headscope.errors import InputError


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, checked once and passed on as one value.

    Attributes:
        batch_size: examples per pass; None: as many as the measurement finds suitable. Changes
            nothing but time and memory.
        memory: bytes that a chunk or a stack may take, or a text such as ``"2GB"``; None: what
            suits the device.
        seed: of everything that is drawn; 0 or more.
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
        """Check every option."""
        size, seed = self.batch_size, self.seed
        if size is not None and not _is_integer(size):
            raise InputError(f"batch_size={size!r} is not a number of examples: give 1 or more.")
        if size is not None and size < 1:
            raise InputError(f"batch_size={size} leaves nothing to run: give 1 or more.")
        if not _is_integer(seed) or seed < 0:
            raise InputError(f"seed={seed!r} is not a seed: give a whole number from 0 on.")
        if self.progress not in (None, True, False):
            raise InputError(f"progress={self.progress!r}: give True, False or None.")
        parse_memory(self.memory)

    @property
    def memory_bytes(self) -> int | None:
        """The memory in bytes; None: what suits the device."""
        return parse_memory(self.memory)

    @property
    def quiet(self) -> "RunOptions":
        """The same without a bar, for a part of a run that shows one itself."""
        return replace(self, progress=False)

    def per_pass(self, length: int, tokens: int) -> int:
        """Examples of one pass: the batch size, else as many as have about ``tokens`` tokens.

        Args:
            length: tokens of one example.
            tokens: that one pass should have.
        """
        return self.batch_size or max(1, tokens // length)

    def track(self, total: int | float, description: str) -> AbstractContextManager[Advance]:
        """Show a progress bar of the work, if one is wanted."""
        return track(total, description, show=self.progress)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
