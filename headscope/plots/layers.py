"""Measures of layers: one small panel per measure, over the places of the residual stream."""

from collections.abc import Sequence
from math import ceil

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table.layers import LayerTable

_COLUMNS = 3
_WIDTH, _HEIGHT = 300, 210  # of a panel, in pixels


def layers(
    table: LayerTable,
    measures: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    theme: Theme = "light",
) -> go.Figure:
    """Draw measures of layers, each in a panel of its own, with intervals over texts.

    Args:
        table: of :func:`headscope.geometry.layers`.
        measures: names of measures; None: all.
        level: of the intervals.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the table lacks a measure.

    Example:
        >>> table = hs.geometry.layers(model, ["The cat sat on the mat. The dog ran."] * 2)
        >>> len(hs.plots.layers(table, ["curvature"]).data)
        2
    """
    chosen = [table[name] for name in (table if measures is None else measures)]
    columns = min(_COLUMNS, len(chosen))
    rows = ceil(len(chosen) / columns)
    titles = [f"{label(one.name.replace('_', ' '))} ({label(one.unit)})" for one in chosen]
    figure = make_subplots(
        rows,
        columns,
        figure=Figure(),
        subplot_titles=titles,
        horizontal_spacing=0.09,
        vertical_spacing=0.3 / rows,
    )
    style = STYLES[theme]
    at = np.arange(len(table.places))
    ticks = at[:: max(1, -(-len(at) // 8))]
    for number, measure in enumerate(chosen):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        low, high = measure.interval(level)
        known = np.isfinite(low) & np.isfinite(high)
        figure.add_scatter(
            x=[*at[known].tolist(), *at[known][::-1].tolist()],
            y=[*low[known].tolist(), *high[known][::-1].tolist()],
            mode="lines",
            fill="toself",
            fillcolor=style.grid,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            **place,
        )
        figure.add_scatter(
            x=at.tolist(),
            y=[None if np.isnan(value) else float(value) for value in measure.mean],
            mode="lines+markers",
            line={"color": style.accent, "width": 2},
            marker={"size": 5},
            customdata=list(table.places),
            hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
            showlegend=False,
            **place,
        )
    dress(
        figure,
        theme,
        title="Measures of layers",
        subtitle=_subtitle(table, level),
        width=max(520, 60 + _WIDTH * columns),
        height=110 + _HEIGHT * rows,
    )
    figure.update_xaxes(
        tickvals=ticks.tolist(), ticktext=[table.places[i] for i in ticks], zeroline=False
    )
    figure.update_yaxes(zeroline=False, nticks=5)
    figure.update_annotations(font_size=12)
    figure.update_layout(margin={"l": 55, "r": 20, "t": 100, "b": 40})
    return figure


def _subtitle(table: LayerTable, level: float) -> str:
    texts = max(measure.per_text.shape[1] for measure in table.measures)
    model = f"{label(table.provenance.model)}, " if table.provenance.model else ""
    return f"{model}{texts} texts; mean and {level:.0%} interval after each block"
