"""Sections of a page as data: texts, facts, small tables, and names of figures.

A result lays itself out in these (``result.sections()``), without knowing how pages or figures are
made: :func:`headscope.plots.figures` draws what a section names, and reports put both together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TableCell = str | int | float | tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """A paragraph; ``quiet`` makes it small."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and their values, one below the other."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rows:
    """A small table. A cell is a text, a number, or a tuple of tokens.

    Attributes:
        columns: their names.
        rows: cells; the first of each names the row.
        caption: what the table shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""


@dataclass(frozen=True)
class Drawn:
    """A figure by its name, to be drawn in the themes of a page.

    Attributes:
        name: of the figure; where no figure has it, nothing is shown.
        said: what it shows, for readers who cannot see it.
        caption: what to look for; default: the same.
    """

    name: str
    said: str
    caption: str | None = None


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: any of the above, or a finished picture."""

    title: str
    blocks: Sequence[Any]
