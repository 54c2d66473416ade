"""The command as it was typed, for the run's record."""

import re
import shlex
import sys
from pathlib import Path

_ABSOLUTE = re.compile(r"^(?:~|/|\\\\|[A-Za-z]:[\\/]|file:)")
# ``--name=`` and ``-n``, with the value in the same word.
_JOINED = re.compile(r"^(--[\w-]+=|-[A-Za-z](?=[/~\\]))(.*)$", re.DOTALL)


def typed() -> str | None:
    """The command line that runs now; None where headscope was called from other code.

    Absolute paths are cut to their last part: what is passed on should not tell where its
    author's home is.
    """
    program = Path(sys.argv[0])
    script = program.stem == "headscope" and program.suffix in ("", ".exe")
    module = program.parts[-2:] == ("headscope", "__main__.py")
    if not (script or module):
        return None
    return shlex.join(["headscope", *map(portable, sys.argv[1:])])


def portable(word: str) -> str:
    """A word of a command line without the folders of this machine."""
    joined = _JOINED.match(word)
    name, value = joined.groups() if joined else ("", word)
    return name + ",".join(_last_part(one) for one in value.split(","))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] if _ABSOLUTE.match(path) else path
