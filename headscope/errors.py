"""Errors that a user can act on. Each is one sentence: the input, the cause, the fix."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real


class HeadscopeError(Exception):
    """Base of everything that headscope raises on purpose; the command line prints it as it is."""


class InputError(HeadscopeError, ValueError):
    """An argument, a file or a config does not hold what it should; nothing was computed yet."""


class HeadscopeWarning(UserWarning):
    """Something worth knowing that changes no number unasked; said once."""


class WriteError(InputError, OSError):
    """A file could not be written; what stood under its name is untouched."""

    def __str__(self) -> str:
        """The sentence, where other errors of the system would print their number."""
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(HeadscopeError):
    """The model runs, but headscope cannot see its heads, or a method does not apply to it."""


class ModelLoadError(HeadscopeError):
    """The model could not be found, read or trusted."""


def nearest(name: object, options: Iterable[str], *, kind: str = "name") -> str:
    """Say that ``name`` is unknown, what was probably meant, and what there is.

    Args:
        name: what the user wrote.
        options: every name that would have been right.
        kind: what the names are names of: ``"scorer"``, ``"metric"``, ``"layer"``.

    Examples:
        >>> nearest("inducton", ["entropy", "induction"], kind="scorer")
        "unknown scorer 'inducton'; did you mean 'induction'? known: entropy, induction."
    """
    known = sorted(set(options))
    by_lower = {option.lower(): option for option in known}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    guess = f" did you mean {by_lower[close[0]]!r}?" if close else ""
    return f"unknown {kind} {name!r};{guess} known: {', '.join(known) or 'none'}."


def whole(value: object, name: str, least: int | None = None) -> int:
    """Return an argument as a number, if it is a whole one.

    Args:
        value: what the caller gave; True and 3.0 are not whole numbers.
        name: of the argument, as the message says it.
        least: the smallest one that makes sense; None: any.

    Raises:
        InputError: for anything else.

    Examples:
        >>> whole(3, "seed")
        3
    """
    number = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if number is not None and (least is None or number >= least):
        return number
    bound = "" if least is None else f", {least} at least"
    raise InputError(f"{name}={value!r}: give a whole number{bound}.")


def positive(value: object, name: str) -> float:
    """Return an argument as a number, if it is finite and above 0.

    Args:
        value: what the caller gave; True is not a number.
        name: of the argument, as the message says it.

    Raises:
        InputError: for anything else.

    Examples:
        >>> positive(0.5, "rate")
        0.5
    """
    number = None if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if number is not None and isfinite(number) and number > 0:
        return number
    raise InputError(f"{name}={value!r}: give a finite number above 0.")
