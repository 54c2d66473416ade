"""The command line. Each command imports what it needs only when it runs, so help is instant."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from typing import Any

from headscope.errors import HeadscopeError, HeadscopeWarning


def main() -> None:
    """Run the command line.

    The exit code is 0 on success, and when the reader of a pipe stops early; 2 with one sentence
    for an error that the user can fix; 130 after Ctrl-C.
    """
    from headscope.cli.app import app

    guard()
    try:
        code = _run(app)
        sys.stdout.flush()
    except CannotPrintError as error:
        silence()
        code = 0
        if not error.closed:
            code = _fail(f"cannot print the result: {error}; the files of --out are saved.")
    except HeadscopeError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("stopped.", 130)
    sys.stderr.flush()
    sys.exit(code)


def _run(app: Callable[[], object]) -> int:
    """Run a command and return its exit code."""
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _fail(said: str, code: int = 2) -> int:
    print(f"headscope: {said}", file=sys.stderr)
    return code


class CannotPrintError(Exception):
    """Standard output accepts no more data.

    Attributes:
        closed: whether the reader has gone, as with ``head``.
    """

    def __init__(self, error: OSError) -> None:
        """Store the system's error."""
        super().__init__(error.strerror or str(error))
        self.closed = isinstance(error, BrokenPipeError)


class Wrapped:
    """A stream that behaves as another one, but for what subclasses change."""

    def __init__(self, stream: Any) -> None:
        """Wrap a stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the stream."""
        return getattr(self._stream, name)


class Output(Wrapped):
    """Standard output whose own failures can be told from those of files."""

    def write(self, text: str) -> int:
        """Write, raising CannotPrintError on failure."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            raise CannotPrintError(error) from error

    def flush(self) -> None:
        """Flush, raising CannotPrintError on failure."""
        try:
            self._stream.flush()
        except OSError as error:
            raise CannotPrintError(error) from error


class Notices(Wrapped):
    """Standard error that drops what cannot be written, so that it never stops the work."""

    def write(self, text: str) -> int:
        """Write, ignoring failures."""
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush, ignoring failures."""
        try:
            self._stream.flush()
        except OSError:
            return


def guard() -> None:
    """Install the guarded streams; a closed stream is replaced with one that discards its input."""
    out, notices = (one or StringIO() for one in (sys.stdout, sys.stderr))
    warnings.showwarning = show_warning
    sys.stdout, sys.stderr = Output(out), Notices(notices)


def silence() -> None:
    """Discard pending output, so that exiting does not fail on it."""
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
    """Print a warning in one line, without its location in the source."""
    if issubclass(category, HeadscopeWarning):
        print(f"headscope: note: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)
