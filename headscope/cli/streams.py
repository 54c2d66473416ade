"""Standard streams that may be closed, full, or gone with their terminal."""

import os
import sys
import warnings
from contextlib import suppress
from io import StringIO
from typing import Any

from headscope.errors import HeadscopeWarning


class CannotPrintError(Exception):
    """Standard output takes nothing any more.

    Attributes:
        closed: whether whoever read it has gone, as ``head`` does when it has enough.
    """

    def __init__(self, error: OSError) -> None:
        """Keep what the system said."""
        super().__init__(error.strerror or str(error))
        self.closed = isinstance(error, BrokenPipeError)


class Output:
    """Standard output whose own failures are told apart from those of files."""

    def __init__(self, stream: Any) -> None:
        """Stand in for a stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or say that nothing can be written."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            raise CannotPrintError(error) from error

    def flush(self) -> None:
        """Flush, or say that nothing can be written."""
        try:
            self._stream.flush()
        except OSError as error:
            raise CannotPrintError(error) from error


class Notices:
    """Standard error; what cannot be said there is dropped: it must not stop the work."""

    def __init__(self, stream: Any) -> None:
        """Stand in for a stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except OSError:
            return


def guard() -> None:
    """Put the guards in place; a stream that is closed becomes one that takes everything."""
    out, notices = (one or StringIO() for one in (sys.stdout, sys.stderr))
    warnings.showwarning = show_warning
    sys.stdout, sys.stderr = Output(out), Notices(notices)


def silence() -> None:
    """Drop what standard output still holds, so that leaving does not fail on it."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    finally:
        os.close(null)
    with suppress(CannotPrintError):
        sys.stdout.flush()


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Say what is worth knowing in one line, without the place in the source."""
    if issubclass(category, HeadscopeWarning):
        print(f"headscope: note: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)
