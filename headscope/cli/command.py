"""The command as it was typed, for the run's record."""

import re
import shlex
import sys
from pathlib import Path

_ABSOLUTE = re.compile(r"^(?:~|/|\\\\|[A-Za-z]:[\\/])")


def typed() -> str | None:
    """The command line that runs now; None where headscope was called from other code.

    Absolute paths are cut to their last part: what is passed on should not tell where its
    author's home is.
    """
    program = Path(sys.argv[0])
    if "headscope" not in (program.stem, program.parent.name):
        return None
    return shlex.join(["headscope", *map(_portable, sys.argv[1:])])


def _portable(word: str) -> str:
    return re.split(r"[\\/]", word.rstrip("\\/"))[-1] if _ABSOLUTE.match(word) else word
