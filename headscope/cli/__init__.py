"""The command line. Each command imports what it needs when it runs, so that help is instant."""

import sys

from headscope.errors import HeadscopeError


def main() -> None:
    """Run the command line: exit code 0, or 2 with one sentence for what the user can mend."""
    from headscope.cli.app import app

    try:
        app()
    except HeadscopeError as error:
        print(f"headscope: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("headscope: stopped.", file=sys.stderr)
        sys.exit(130)
