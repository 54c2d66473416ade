"""Exceptions and argument checks; each message gives the input, the cause and the fix."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real


class HeadscopeError(Exception):
    """Base class of all deliberate errors; the command line prints the message as is."""


class InputError(HeadscopeError, ValueError):
    """Invalid argument, file or config, found before anything was computed."""


class HeadscopeWarning(UserWarning):
    """A remark that does not affect any result; shown once."""


class WriteError(InputError, OSError):
    """A file could not be written; an existing file of that name is unchanged."""

    def __str__(self) -> str:
        """Return the message, not the number that operating-system errors print."""
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(HeadscopeError):
    """The model runs, but its heads cannot be read, or a method does not apply to it."""


class ModelLoadError(HeadscopeError):
    """The model could not be found, read or trusted."""


def nearest(name: object, options: Iterable[str], *, kind: str = "name") -> str:
    """Build the message for an unknown name: the closest match and all known names.

    Args:
        name: what the user wrote.
        options: all valid names.
        kind: what is being named: ``"scorer"``, ``"metric"``, ``"layer"``.

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
    """Validate an integer argument and return it.

    Args:
        value: what the caller gave; True and 3.0 are rejected.
        name: the argument's name, for the message.
        least: smallest valid value; None: no limit.

    Raises:
        InputError: if the value is not such an integer.

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
    """Validate a finite, positive number and return it.

    Args:
        value: what the caller gave; True is rejected.
        name: the argument's name, for the message.

    Raises:
        InputError: if the value is not such a number.

    Examples:
        >>> positive(0.5, "rate")
        0.5
    """
    number = None if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if number is not None and isfinite(number) and number > 0:
        return number
    raise InputError(f"{name}={value!r}: give a finite number above 0.")
