"""Effects of interventions on a grid, as a heatmap with the grid's own labels."""

from html import unescape

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import EffectGrid

_TOP, _RIGHT = 66, 96
_CHARACTER = 6.6  # pixels of one character of a label
_MOST_LABEL = 18


def effect_heatmap(
    grid: EffectGrid, *, limits: tuple[float, float] | None = None, theme: Theme = "light"
) -> go.Figure:
    """Mean effect of every cell: first axis downwards, second to the right, coloured about 0.

    Args:
        grid: of one axis (drawn as a row) or two.
        limits: values of the first and last colour; default: the largest effect to both sides.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the grid has more axes.
    """
    if grid.mean.ndim > 2:
        raise InputError(
            f"{grid.name!r} has the axes {', '.join(grid.axes)}, and a heatmap has two: measure "
            "it over two of them."
        )
    wide = grid.mean.ndim == 1
    axes = ("", *grid.axes) if wide else grid.axes
    rows, columns = ((grid.name,), grid.labels[0]) if wide else grid.labels
    values = np.atleast_2d(grid.mean).astype(np.float32)
    down, across = ([label(one, _MOST_LABEL) for one in names] for names in (rows, columns))
    known = np.abs(values[np.isfinite(values)])
    reach = float(known.max(initial=0.0)) or 1.0
    low, high = limits or (-reach, reach)
    cell = int(min(34, max(9, 900 / max(len(rows), len(columns)))))
    longest, widest = (
        max((len(unescape(one)) for one in names), default=1) for names in (down, across)
    )
    left, bottom = int(34 + _CHARACTER * longest), int(48 + 0.87 * _CHARACTER * widest)
    figure = Figure(
        go.Heatmap(
            z=values,
            x=list(range(len(across))),
            y=list(range(len(down))),
            text=[[f"<b>{one} {other}</b>".strip() for other in across] for one in down],
            hovertemplate="%{text} %{z:.3g} " + label(grid.unit) + "<extra></extra>",
            hoverongaps=False,
            zmin=low,
            zmax=high,
            colorscale=STYLES[theme].diverging,
            colorbar={
                "title": {"text": label(grid.unit), "side": "right"},
                "thickness": 14,
                "outlinewidth": 0,
            },
            xgap=1,
            ygap=1,
        )
    )
    dress(
        figure,
        theme,
        title=label(grid.name),
        subtitle=_subtitle(grid),
        width=max(420, left + _RIGHT + cell * len(across)),
        height=max(220, _TOP + bottom + cell * len(down)),
    )
    figure.update_xaxes(
        title_text=axes[1],
        tickvals=list(range(len(across))),
        ticktext=across,
        tickangle=-60 if widest > 3 else 0,
        showgrid=False,
        zeroline=False,
        range=[-0.5, len(across) - 0.5],
    )
    figure.update_yaxes(
        title_text=axes[0],
        tickvals=list(range(len(down))),
        ticktext=down,
        showgrid=False,
        zeroline=False,
        range=[len(down) - 0.5, -0.5],
    )
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing,
        margin={"l": left, "r": _RIGHT, "t": _TOP, "b": bottom},
    )
    return figure


def _subtitle(grid: EffectGrid) -> str:
    parts = [label(grid.provenance.model)] if grid.provenance.model else []
    parts.append(f"mean of {len(grid.unedited)} examples")
    if np.isnan(grid.mean).any():
        parts.append("grey: no value")
    return ", ".join(parts)
