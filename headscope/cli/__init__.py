"""The command line. Each command imports what it needs when it runs, so that help is instant."""

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

    Exit code 0, also when whoever read the output had enough of it; 2 with one sentence for what
    the user can mend; 130 after Ctrl-C.
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
            code = _fail(f"cannot print the result: {error}; what --out asked for is saved.")
    except HeadscopeError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("stopped.", 130)
    sys.stderr.flush()
    sys.exit(code)


def _run(app: Callable[[], object]) -> int:
    """Run a command; its exit code."""
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _fail(said: str, code: int = 2) -> int:
    print(f"headscope: {said}", file=sys.stderr)
    return code


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
