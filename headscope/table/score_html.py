"""One score in a notebook: a small coloured grid, layers downwards, as static HTML."""

from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from headscope.table.scores import HeadScores

_CELL = "padding:1px 6px;text-align:right;font-variant-numeric:tabular-nums"
_MOST = 32  # layers and heads that are shown whole


def score_html(scores: "HeadScores") -> str:
    """Means of all heads, or of the best where there are many; significant ones bold."""
    from headscope.table.excerpt import best, fraction, written

    layers, heads = scores.mean.shape
    marks = scores.significant()
    unit = f", {escape(scores.unit)}" if scores.unit else ""
    title = f"<p><b>{escape(scores.name)}</b>{unit}. {escape(scores.description)}</p>"
    if layers > _MOST or heads > _MOST:
        rows = "".join(
            f'<tr><th style="{_CELL}">{head}</th><td style="{_CELL}">{written(mean)}</td></tr>'
            for head, mean in best(scores, 10)
        )
        return f"{title}<table><tbody>{rows}</tbody></table><p>10 of {layers * heads} heads.</p>"

    def cell(layer: int, head: int) -> str:
        value = float(scores.mean[layer, head])
        strength = round(0.6 * fraction(scores, value), 2) if np.isfinite(value) else 0
        bold = ";font-weight:700" if marks[layer, head] else ""
        ground = f";background:rgba(38,130,190,{strength})"
        return f'<td style="{_CELL}{ground}{bold}">{written(value)}</td>'

    top = "".join(f'<th style="{_CELL}">H{head}</th>' for head in range(heads))
    body = "".join(
        f'<tr><th style="{_CELL}">L{layer}</th>{"".join(cell(layer, h) for h in range(heads))}</tr>'
        for layer in range(layers)
    )
    return (
        f'{title}<div style="overflow-x:auto"><table style="border-collapse:collapse"><thead><tr>'
        f"<th></th>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
