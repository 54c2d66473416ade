"""Sections as JSON in a run's folder, so that reports can show them again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headscope.base.sections import Cell, Drawn, Facts, Grid, Section, Words
from headscope.errors import InputError
from headscope.report.sections import Block, Picture, plain_figure

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
        rows = [tuple(_cell(cell) for cell in row) for row in plain["rows"]]
        return Grid(tuple(str(name) for name in plain["columns"]), rows, str(plain["caption"]))
    if kind == "picture":
        themes = {name: _figure(plain[name]) for name in ("light", "dark")}
        return Picture(**themes, said=str(plain["said"]), caption=str(plain["caption"]))
    raise ValueError(f"unknown kind of block {kind!r}")


def _cell(cell: object) -> Cell:
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
