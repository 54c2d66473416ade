"""Sections of a page with their pictures drawn, as plain values for the template.

A run's folder keeps them as JSON, so that reports can show them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from headscope.base.glance import short
from headscope.base.sections import Cell, Drawn, Facts, Grid, Section, Words
from headscope.errors import InputError
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


_MAX_BYTES = 100_000_000


def sections_json(sections: Sequence[Section]) -> bytes:
    """Sections with their pictures in both themes, as JSON."""
    plain = [
        {"title": one.title, "blocks": [_plain(block) for block in one.blocks]} for one in sections
    ]
    return json.dumps(plain, separators=(",", ":")).encode()


def read_sections(file: Path) -> list[Section]:
    """Read what :func:`sections_json` wrote.

    Raises:
        InputError: if the file holds something else.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{str(file)!r} is larger than {_MAX_BYTES // 10**6} MB.")
        return [
            Section(str(one["title"]), [_block(block) for block in one["blocks"]])
            for one in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{str(file)!r} holds no sections of a report: {error!r}.") from None


def _plain(block: Block) -> dict[str, Any]:
    if isinstance(block, Words):
        return {"kind": "words", "text": block.text, "quiet": block.quiet}
    if isinstance(block, Facts):
        return {"kind": "facts", "pairs": [list(pair) for pair in block.pairs]}
    if isinstance(block, Grid):
        rows = [list(row) for row in block.rows]
        return {
            "kind": "grid",
            "columns": list(block.columns),
            "rows": rows,
            "caption": block.caption,
        }
    if isinstance(block, Drawn):
        raise TypeError(f"the figure {block.name!r} is not drawn yet: see with_pictures.")
    return {
        "kind": "picture",
        "light": plain_figure(block.light),
        "dark": plain_figure(block.dark),
        "said": block.said,
        "caption": block.caption,
    }


def _block(plain: Mapping[str, Any]) -> Block:
    kind = plain["kind"]
    if kind == "words":
        return Words(str(plain["text"]), bool(plain["quiet"]))
    if kind == "facts":
        return Facts([(str(name), str(value)) for name, value in plain["pairs"]])
    if kind == "grid":
        rows = [tuple(_read_cell(cell) for cell in row) for row in plain["rows"]]
        return Grid(tuple(str(name) for name in plain["columns"]), rows, str(plain["caption"]))
    if kind == "picture":
        themes = {name: _figure(plain[name]) for name in ("light", "dark")}
        return Picture(**themes, said=str(plain["said"]), caption=str(plain["caption"]))
    raise ValueError(f"unknown kind of block {kind!r}")


def _read_cell(cell: object) -> Cell:
    if isinstance(cell, list):
        return tuple(str(token) for token in cell)
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return str(cell)
    return cell


def _figure(plain: object) -> dict[str, Any]:
    """Data and layout of a figure; nothing else that a file might say."""
    if not isinstance(plain, dict):
        raise TypeError("a figure is an object")
    return {"data": list(plain["data"]), "layout": dict(plain["layout"])}
