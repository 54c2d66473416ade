"""A number for every pair of heads, as a matrix."""

import numpy as np
import plotly.graph_objects as go

from headscope.plots.blocks import block_max
from headscope.plots.figure import Figure
from headscope.plots.style import SEQUENTIAL, STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import PairScores

_MOST_CELLS = 512  # a side; above, every cell stands for a block of heads


def composition_matrix(
    scores: PairScores, *, limits: tuple[float, float] | None = None, theme: Theme = "light"
) -> go.Figure:
    """Earlier heads downwards, later heads to the right; pairs that cannot exist stay empty.

    Beyond 512 heads a side a cell is the largest of a block of pairs, and the subtitle says so.

    Args:
        scores: such as :func:`headscope.circuits.composition`.
        limits: values of the first and last colour; default: the smallest and largest value.
        theme: ``light`` or ``dark``.

    Example:
        >>> figure = hs.plots.composition_matrix(hs.circuits.composition(model, "K"))
        >>> type(figure).__name__
        'Figure'
    """
    layers, heads = scores.values.shape[:2]
    size = layers * heads
    cells = np.where(scores.present, scores.values, np.nan).reshape(size, size)
    known = np.isfinite(cells)
    rows, columns = (np.flatnonzero(known.any(axis=axis)) for axis in (1, 0))
    names = np.array([f"L{layer}H{head}" for layer in range(layers) for head in range(heads)])
    cells, row_names, column_names = cells[np.ix_(rows, columns)], names[rows], names[columns]
    block = -(-max(*cells.shape, 1) // _MOST_CELLS)
    if cells.size and block > 1:
        with np.errstate(invalid="ignore"):
            cells = block_max(np.where(np.isnan(cells), -np.inf, cells), block)
        cells[np.isneginf(cells)] = np.nan
        row_names, column_names = row_names[::block], column_names[::block]
    low, high = limits or _limits(cells)
    figure = Figure(
        go.Heatmap(
            z=cells.astype(np.float32),
            x=column_names.tolist(),
            y=row_names.tolist(),
            hovertemplate="<b>%{y} to %{x}</b> %{z:.3f}<extra></extra>",
            hoverongaps=False,
            zmin=low,
            zmax=high,
            colorscale=STYLES[theme].diverging if low < 0 < high else SEQUENTIAL,
            colorbar={
                "title": {"text": label(scores.unit), "side": "right"},
                "thickness": 14,
                "outlinewidth": 0,
            },
            xgap=1 if max(cells.shape) <= 40 else 0,
            ygap=1 if max(cells.shape) <= 40 else 0,
        )
    )
    cell = min(34.0, max(1.0, 560 / max(*cells.shape, 1)))
    parts = [label(scores.provenance.model), label(scores.description, 80)]
    if block > 1:
        parts.append(f"each cell the largest of {block} x {block} pairs")
    subtitle = ", ".join(part for part in parts if part)
    dress(
        figure,
        theme,
        title=label(scores.name.replace("_", " ")),
        subtitle=subtitle,
        width=int(max(110 + 6.3 * len(subtitle), cell * cells.shape[1] + 190)),
        height=int(max(240, cell * cells.shape[0] + 150)),
    )
    for update, shown in ((figure.update_xaxes, column_names), (figure.update_yaxes, row_names)):
        update(type="category", showgrid=False, zeroline=False, **_ticks(shown.tolist()))
    figure.update_xaxes(title_text="later head", tickangle=-60)
    figure.update_yaxes(title_text="earlier head", title_standoff=10, autorange="reversed")
    figure.update_layout(margin={"l": 96, "r": 100, "t": 70, "b": 80})
    return figure


def _limits(cells: np.ndarray) -> tuple[float, float]:
    seen = cells[np.isfinite(cells)]
    if seen.size == 0:
        return (0.0, 1.0)
    low, high = float(seen.min()), float(seen.max())
    if low < 0:
        reach = max(-low, high)
        return (-reach, reach)
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(names: list[str]) -> dict[str, object]:
    """Every name where there is room, else the first head of every layer."""
    if len(names) <= 40:
        return {"tickvals": list(range(len(names))), "ticktext": names}
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        seen.setdefault(name.partition("H")[0], at)
    step = -(-len(seen) // 40)
    shown = list(seen.items())[::step]
    return {"tickvals": [at for _, at in shown], "ticktext": [layer for layer, _ in shown]}
