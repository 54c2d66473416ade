"""Recall of needles: text lengths to the right, depths downwards."""

import numpy as np
import plotly.graph_objects as go

from headscope.plots.figure import Figure
from headscope.plots.style import SEQUENTIAL, STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import RecallGrid

_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 96, 66, 56


def recall_grid(grid: RecallGrid, *, theme: Theme = "light") -> go.Figure:
    """Share of right answers by length and depth, coloured from 0 to 1; grey: no example.

    Args:
        grid: ``retrieval.recall_grid()``.
        theme: ``light`` or ``dark``.

    Example:
        >>> probe = hs.probes.needle(model, lengths=[64, 96], depths=2, per_cell=1)
        >>> found = hs.retrieval.decoded(model, probe)
        >>> hs.plots.recall_grid(found.recall_grid()).data[0].z.shape
        (2, 2)
    """
    cells = grid.share.T.astype(np.float32)
    columns = [_length(float(one)) for one in grid.lengths]
    rows = [f"{100 * one:.0f}%" for one in grid.depths]
    figure = Figure(
        go.Heatmap(
            z=cells,
            x=columns,
            y=rows,
            customdata=grid.count.T,
            text=[["" if np.isnan(one) else f"{one:.2g}" for one in row] for row in cells],
            texttemplate="%{text}" if cells.size <= 150 else None,
            hovertemplate="%{x} tokens, depth %{y}: %{z:.2f} of %{customdata}<extra></extra>",
            hoverongaps=False,
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {"text": "share right", "side": "right"},
                "thickness": 14,
                "outlinewidth": 0,
            },
            xgap=1,
            ygap=1,
        )
    )
    said = [label(grid.provenance.model)] if grid.provenance.model else []
    said.append(f"answers with recall above {grid.threshold:g}")
    beyond = grid.provenance.probe.get("extrapolated_from")
    if beyond is not None:
        said.append(f"trained on {beyond} tokens")
    subtitle = ", ".join(said)
    dress(
        figure,
        theme,
        title="Needles found",
        subtitle=subtitle,
        width=max(_LEFT + _RIGHT + 52 * len(columns), 110 + int(6.3 * len(subtitle)), 420),
        height=max(240, _TOP + _BOTTOM + 26 * len(rows)),
    )
    figure.update_xaxes(title_text="tokens", type="category", showgrid=False)
    figure.update_yaxes(title_text="depth", type="category", autorange="reversed", showgrid=False)
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
    )
    return figure


def _length(tokens: float) -> str:
    """``2048`` as ``2k``."""
    whole = int(tokens)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)
