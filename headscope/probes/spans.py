"""Parts of a text named in words: ``Mary``, ``the second 'Mary'``, ``the last 'to'``."""

import re

from headscope.errors import InputError

_WORDS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
]
_NTH = {word: number for number, word in enumerate(_WORDS, 1)} | {"last": 0}
_NAMED = re.compile(
    rf"""(?:the\s+)?(?P<nth>{"|".join(_NTH)}|\d+(?:st|nd|rd|th))\s+(?P<quote>['"])(?P<part>.+)(?P=quote)""",
    re.IGNORECASE | re.DOTALL,
)


def find_span(text: str, said: str) -> tuple[int, int]:
    """Characters of a part of a text, end excluded.

    Args:
        text: to look in.
        said: the part itself, which must stand there once; or which of several it is, the part in
            quotes: ``the second 'Mary'``, ``the last 'to'``, ``the 12th ','``. As whole words if
            it stands there as whole words.

    Raises:
        InputError: if it does not stand there, or more often than once where nothing says which.

    Example:
        >>> from headscope.probes.spans import find_span
        >>> find_span("Mary saw Mary.", "the second 'Mary'")
        (9, 13)
    """
    named = _NAMED.fullmatch(said.strip())
    part = said if named is None else named["part"]
    if not part.strip():
        raise InputError("a part of a text without a character cannot be found.")
    whole = re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)
    starts = [match.start() for match in whole]
    if not starts:
        starts = [match.start() for match in re.finditer(re.escape(part), text)]
    if not starts:
        raise InputError(f"{part!r} does not stand in the text {_short(text)}.")
    if named is None and len(starts) > 1:
        raise InputError(
            f"{part!r} stands {len(starts)} times in the text {_short(text)}: say which, e.g. "
            f"\"the second '{part}'\"."
        )
    number = 1 if named is None else _number(named["nth"].lower())
    if number > len(starts):
        raise InputError(
            f"there is no {said!r}: {part!r} stands {len(starts)} times in the text {_short(text)}."
        )
    start = starts[number - 1]
    return start, start + len(part)


def _number(nth: str) -> int:
    """Which occurrence, from 1; 0 is the last one."""
    if nth in _NTH:
        return _NTH[nth]
    number = int(re.sub(r"\D", "", nth))
    if number < 1:
        raise InputError(f"{nth!r}: occurrences are counted from the first.")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
