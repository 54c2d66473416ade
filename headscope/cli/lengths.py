"""Text lengths and depths as people type them."""

import re

from headscope.errors import InputError

_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_MOST = 64


def parse_lengths(text: str) -> list[int]:
    """``1k..32k`` (doubling), ``64,128,1k``, or both mixed; k is 1024.

    Raises:
        InputError: if it is neither.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dots, high = part.partition("..")
        if not dots:
            found.append(_length(low, text))
            continue
        length, last = _length(low, text), _length(high, text)
        if last < length:
            raise InputError(
                f"the lengths {part.strip()!r} run downwards: write the smaller first."
            )
        while length <= last:
            found.append(length)
            length *= 2
    if len(found) > _MOST:
        raise InputError(f"{text!r} is {len(found)} lengths: give at most {_MOST}.")
    return list(dict.fromkeys(found))


def _length(word: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,9})\s*([kKmM]?)\s*", word)
    if match is None or int(match[1]) < 1:
        raise InputError(
            f"{text!r} is not a list of lengths: write 1k..32k (doubling) or 128,512,2k."
        )
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_depths(text: str) -> int | list[float]:
    """``10`` (that many, evenly), or ``0,0.5,1``.

    Raises:
        InputError: if it is neither.
    """
    try:
        if "," not in text and "." not in text:
            count = int(text)
            if not 1 <= count <= 1000:
                raise ValueError
            return count
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{text!r} are not depths: write how many (10), or shares from 0 to 1 (0,0.5,1)."
        ) from None
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"depths are shares from 0 (start) to 1 (end); got {text!r}.")
    return shares
