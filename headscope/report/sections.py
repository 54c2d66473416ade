"""What a page can be put together from: sections of texts, facts, small tables and pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from headscope.base.glance import short

Cell = str | int | float | tuple[str, ...]


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
class Grid:
    """A small table. A cell is a text, a number, or a tuple of tokens.

    Attributes:
        columns: their names.
        rows: cells; the first of each names the row.
        caption: what the table shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure in both themes; the page shows the one that fits the reader's.

    Attributes:
        light: drawn for light paper; a figure, or its JSON as it was kept.
        dark: drawn for dark paper.
        said: what it shows, for readers who cannot see it.
        caption: what to look for.
    """

    light: go.Figure | dict[str, Any]
    dark: go.Figure | dict[str, Any]
    said: str
    caption: str = ""


Block = Words | Facts | Grid | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def laid_out(
    sections: Sequence[Section], first: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sections as plain values for the template, and their pictures, numbered from ``first``."""
    pictures: list[dict[str, Any]] = []
    shown = []
    for number, section in enumerate(sections):
        blocks = []
        for block in section.blocks:
            plain: dict[str, Any] = {"kind": type(block).__name__.lower(), "is": block}
            if isinstance(block, Grid):
                plain["rows"] = [[_cell(cell) for cell in row] for row in block.rows]
            elif isinstance(block, Picture):
                plain["number"] = first + len(pictures)
                themes = {"light": block.light, "dark": block.dark}
                pictures.append({name: plain_figure(one) for name, one in themes.items()})
            blocks.append(plain)
        shown.append({"id": f"section-{number}", "title": section.title, "blocks": blocks})
    return shown, pictures


def plain_figure(figure: go.Figure | dict[str, Any]) -> dict[str, Any]:
    """A figure as JSON values."""
    if isinstance(figure, dict):
        return figure
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _cell(cell: Cell) -> dict[str, Any]:
    """A cell as text or as tokens, and whether it is a number."""
    if isinstance(cell, tuple):
        return {"tokens": cell, "text": "", "number": False}
    if isinstance(cell, str):
        return {"tokens": (), "text": cell, "number": False}
    text = str(cell) if isinstance(cell, int) else short(float(cell))
    return {"tokens": (), "text": text, "number": True}
