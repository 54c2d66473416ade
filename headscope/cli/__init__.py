"""The command line. Each command imports what it needs when it runs, so that help is instant."""

import sys
from collections.abc import Callable

from headscope.errors import HeadscopeError


def main() -> None:
    """Run the command line.

    Exit code 0, also when whoever read the output had enough of it; 2 with one sentence for what
    the user can mend; 130 after Ctrl-C.
    """
    from headscope.cli import streams
    from headscope.cli.app import app

    streams.guard()
    try:
        code = _run(app)
        sys.stdout.flush()
    except streams.CannotPrintError as error:
        streams.silence()
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
