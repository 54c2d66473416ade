"""Attention of one head on one example."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8

from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.pairs import block_max
from headscope.plots.style import SEQUENTIAL, STYLES, Theme, dress
from headscope.plots.text import label

_MOST_CELLS = 512  # a side; above, every cell stands for a block of positions
_MOST_EXACT = 64


def attention_pattern(
    pattern: Float[np.ndarray, "query key"],
    tokens: Sequence[str] | None = None,
    *,
    title: str = "attention",
    theme: Theme = "light",
) -> go.Figure:
    """Probabilities with which each query (downwards) attends to each key.

    Colours are kept as 1/255 of the largest probability, which is enough for the eye and a fifth
    of the size; up to 64 positions hovering shows exact values. Beyond 512 positions a cell is
    the largest of a block of positions, and the title says so.

    Args:
        pattern: attention probabilities; NaN is missing.
        tokens: one text per key position; queries are the last of them if they are fewer.
        title: e.g. ``"gpt2 L5H1"``.
        theme: ``light`` or ``dark``.

    Example:
        >>> layer = hs.capture.collect(model, probe, layers=[2], heads=[1])[2]
        >>> type(hs.plots.attention_pattern(layer.pattern[0, 0].numpy())).__name__
        'Figure'
    """
    queries, keys = pattern.shape
    if tokens is not None and (len(tokens) != keys or queries > keys):
        raise InputError(f"{len(tokens)} tokens for a pattern of {queries} queries, {keys} keys.")
    block = -(-max(queries, keys) // _MOST_CELLS)
    cells = block_max(np.nan_to_num(pattern), block)
    peak = float(cells.max(initial=0.0))
    key_names = _names(tokens, keys, block)
    query_names = (
        _names(None, queries, block, keys - queries) if block > 1 else key_names[keys - queries :]
    )
    exact = max(queries, keys) <= _MOST_EXACT
    figure = Figure(
        go.Heatmap(
            z=_quantised(cells, peak),
            x=key_names,
            y=query_names,
            customdata=cells.astype(np.float32) if exact else None,
            hovertemplate="query %{y}<br>key %{x}<br>"
            + ("%{customdata:.4f}" if exact else f"%{{z}}/255 of {peak:.3g}")
            + "<extra></extra>",
            zmin=0,
            zmax=255,
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {"text": "probability", "side": "right"},
                "tickvals": [0, 63.75, 127.5, 191.25, 255],
                "ticktext": [f"{peak * part:.2g}" for part in (0, 0.25, 0.5, 0.75, 1)],
                "thickness": 14,
                "outlinewidth": 0,
            },
        )
    )
    side = int(min(640, max(260, 18 * cells.shape[1])))
    tall = int(min(640, max(160, side * cells.shape[0] / cells.shape[1])))
    said = [f"{queries} queries x {keys} keys"]
    if block > 1:
        said.append(f"each cell the largest of {block} x {block}")
    if not exact:
        said.append("in steps of 1/255 of the largest")
    dress(
        figure,
        theme,
        title=label(title),
        subtitle=", ".join(said),
        width=max(side + 250, 440),
        height=tall + 210,
    )
    common = {"type": "category", "showgrid": False}
    figure.update_xaxes(title_text="key", tickangle=-60, nticks=side // 14, **common)
    figure.update_yaxes(title_text="query", autorange="reversed", nticks=tall // 14, **common)
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing, margin={"l": 150, "r": 100, "t": 70, "b": 140}
    )
    return figure


def _quantised(cells: Float[np.ndarray, "row col"], peak: float) -> UInt8[np.ndarray, "row col"]:
    """Cells in 1/255 of the peak."""
    return np.rint(cells / (peak or 1.0) * 255).clip(0, 255).astype(np.uint8)


def _names(tokens: Sequence[str] | None, n: int, block: int, start: int = 0) -> list[str]:
    """One distinct label per row or column: position, and the token where a cell has but one."""
    if block > 1:
        return [f"{start + at}-{start + min(at + block, n) - 1}" for at in range(0, n, block)]
    if tokens is None:
        return [str(at) for at in range(n)]
    return [f"{at} {label(token, 16)}" for at, token in enumerate(tokens)]
