"""One head as small static tables for notebooks: every text escaped, nothing fetched."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from headscope.base.glance import short
from headscope.heads import HeadIndex
from headscope.plots.text import visible
from headscope.table import HeadCard, HeadScores, HeadTable

_CELL = "padding:1px 8px;text-align:left"
_MARK = "padding:0 .3em;background:rgba(127,127,127,.18);border-radius:3px;white-space:pre"


def head_html(card: HeadCard, scan: HeadTable | None, effects: Sequence[HeadScores]) -> str:
    """Title, scores, tokens of the largest direction, partners."""
    head = HeadIndex.parse(card.head)
    known = [one for one in (scan or {}).values() if np.isfinite(one.mean[head])]
    scores = [_row(one, head) for one in [*known, *effects]]
    parts = [f"<h4>{_said(card.model)} {card.head}</h4>"]
    if scores:
        parts.append(_table(("score", "mean", "± standard error", "null", "unit"), scores))
    parts += [_directions("reads → writes (OV)", card.ov), _directions("query → key (QK)", card.qk)]
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        lines = [
            f"{_said(mode)}: {', '.join(f'{one} {value:.2f}' for one, value in found)}"
            for mode, found in partners.items()
            if found
        ]
        if lines:
            parts.append(f"<p><b>{title}</b> {'; '.join(lines)}</p>")
    parts += [f"<p>No {_said(name)}: {_said(why)}</p>" for name, why in card.missing.items()]
    return "".join(parts)


def _row(scores: HeadScores, head: HeadIndex) -> tuple[str, ...]:
    role = scores.threshold is not None and bool(scores.significant()[head])
    name = f"<b>{_said(scores.name)}</b>" if role else _said(scores.name)
    values = (float(one[head]) for one in (scores.mean, scores.sem, scores.null))
    return (name, *map(short, values), _said(scores.unit))


def _directions(title: str, views: Sequence[dict[str, Any]]) -> str:
    if not views:
        return ""
    first = views[0]
    lines = []
    for sign in (0, 1):
        sides = [_tokens(first[side][sign]) for side in ("reads", "writes")]
        lines.append(f"{sides[0]} → {sides[1]}")
    return f"<p><b>{title}</b><br>{'<br>'.join(lines)}</p>"


def _tokens(tokens: Iterable[str]) -> str:
    return " ".join(f'<span style="{_MARK}">{_said(one)}</span>' for one in list(tokens)[:6])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f'<th style="{_CELL}">{name}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td style={chr(34)}{_CELL}{chr(34)}>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _said(text: str) -> str:
    return escape(visible(text[:80]))
