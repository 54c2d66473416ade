"""Names and tokens as labels: they are data, so nothing in them may act."""

import unicodedata
from html import escape

_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣", "\x7f": "␡"}
# Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Zl and Zp separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Text with everything that does not show made to show, so that no label can lie.

    Line breaks, tabs and outer spaces become signs; control, zero-width and direction characters
    become their number, such as ``⟨202E⟩``.

    Examples:
        >>> visible(" the\n")
        '␣the↵'
    """
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    trail = len(text) - lead - len(inner)
    return _MARKS[" "] * lead + "".join(map(_mark, inner)) + _MARKS[" "] * trail


def label(text: str, limit: int = 60) -> str:
    """Text for plotly, which reads tags and entities in every label: escaped, shown, cut."""
    shown = visible(text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    # %{ would start a variable in a hover template.
    return escape(shown, quote=False).replace("%{", "%&#123;")


def _mark(character: str) -> str:
    if character in _MARKS and character != " ":
        return _MARKS[character]
    if unicodedata.category(character) in _INVISIBLE:
        return f"⟨{ord(character):04X}⟩"
    return character
