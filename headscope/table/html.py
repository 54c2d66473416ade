"""A table in a notebook: best heads as static HTML, every name escaped, nothing fetched."""

from html import escape

from headscope.heads import HeadIndex
from headscope.table.excerpt import best_heads, by_interest, fraction, unreached, written
from headscope.table.roles import find_roles
from headscope.table.scores import HeadScores
from headscope.table.table import HeadTable

_CELL = "padding:2px 8px;text-align:right;font-variant-numeric:tabular-nums"


def render_html(table: HeadTable, limit: int = 40) -> str:
    """The 3 best heads of each score (at most ``limit`` rows), coloured, with the roles below."""
    scores = by_interest(table)
    heads = best_heads(scores)[:limit]
    layers, width = table.shape
    names = "".join(
        f'<th style="{_CELL}" title="{escape(one.description)}">{escape(one.name)}</th>'
        for one in scores
    )
    body = "".join(
        f'<tr><th style="{_CELL}">{head}</th>{"".join(_cell(one, head) for one in scores)}</tr>'
        for head in heads
    )
    roles = "".join(f"<li>{escape(str(finding))}</li>" for finding in find_roles(scores, 0.05))
    missing = "".join(f"<p>{escape(said)}</p>" for said in map(unreached, scores) if said)
    return (
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse">'
        f'<thead><tr><th style="{_CELL}">head</th>{names}</tr></thead><tbody>{body}</tbody>'
        f"</table></div><p>{len(heads)} of {layers * width} heads: the 3 best of each score.</p>"
        + missing
        + (f"<ul>{roles}</ul>" if roles else "")
    )


def _cell(scores: HeadScores, head: HeadIndex) -> str:
    """One mean on a see-through ground, which reads on light and dark pages."""
    value = scores[head]
    strength = round(0.6 * fraction(scores, value), 2)
    return (
        f'<td style="{_CELL};background:rgba(38,130,190,{strength})" '
        f'title="{escape(scores.name)} {head}">{written(value)}</td>'
    )
