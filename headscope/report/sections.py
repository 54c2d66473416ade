"""Sections of a page with their pictures drawn, as plain values for the template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from headscope.base.glance import short
from headscope.base.sections import Cell, Drawn, Facts, Grid, Section, Words
from headscope.plots.figures import Drawing


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


Block = Words | Facts | Grid | Drawn | Picture


def with_pictures(sections: Sequence[Section], drawings: Mapping[str, Drawing]) -> list[Section]:
    """Sections whose named figures are drawn in both themes; names without a figure are dropped."""
    return [
        Section(
            one.title,
            [_pictured(block, drawings) for block in one.blocks if _known(block, drawings)],
        )
        for one in sections
    ]


def laid(result: object) -> Sequence[Section]:
    """Sections of a result; none where it does not lay itself out."""
    sections = getattr(result, "sections", None)
    return sections() if sections is not None else ()


def _known(block: Block, drawings: Mapping[str, Drawing]) -> bool:
    return not isinstance(block, Drawn) or block.name in drawings


def _pictured(block: Block, drawings: Mapping[str, Drawing]) -> Block:
    if not isinstance(block, Drawn):
        return block
    draw = drawings[block.name]
    caption = block.said if block.caption is None else block.caption
    return Picture(draw("light"), draw("dark"), said=block.said, caption=caption)


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
