"""What a lens reads: the most likely token at every layer (upwards) and position (to the right)."""

import numpy as np
import plotly.graph_objects as go

from headscope.plots.figure import Figure
from headscope.plots.style import SEQUENTIAL, STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import LensGrid

_MOST_POSITIONS = 40
_MOST_TEXT = 9  # characters that fit a cell
_LEFT, _RIGHT, _TOP, _BOTTOM = 116, 96, 66, 96


def lens_grid(grid: LensGrid, *, theme: Theme = "light") -> go.Figure:
    """Most likely token at every place and position, coloured by its probability from 0 to 1.

    The model's own reading is on top. Hovering shows the likely tokens with their probabilities,
    the divergence from the model, and where the followed token stands. Of more than 40 positions
    the last 40 are shown, and the subtitle says so.

    Args:
        grid: of a lens.
        theme: ``light`` or ``dark``.

    Example:
        >>> grid = hs.lens.logit_lens(model, "The cat sat on the")
        >>> type(hs.plots.lens_grid(grid)).__name__
        'Figure'
    """
    first = max(0, len(grid.positions) - _MOST_POSITIONS)
    shown = slice(first, None)
    top_down = slice(None, None, -1)
    best = grid.texts[top_down, shown, 0]
    columns = [
        f"{at} {label(text, _MOST_TEXT)}"
        for at, text in zip(grid.positions[shown].tolist(), grid.tokens[shown], strict=True)
    ]
    figure = Figure(
        go.Heatmap(
            z=grid.probabilities[top_down, shown, 0].astype(np.float32),
            x=columns,
            y=list(grid.rows[top_down]),
            text=[[label(str(text), _MOST_TEXT) for text in row] for row in best],
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=_hovers(grid, first)[top_down],
            hovertemplate="%{customdata}<extra></extra>",
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {"text": "probability", "side": "right"},
                "thickness": 14,
                "outlinewidth": 0,
            },
            xgap=1,
            ygap=1,
        )
    )
    said = [label(grid.provenance.model)] if grid.provenance.model else []
    said.append("most likely token in each cell")
    if first:
        said.append(f"the last {_MOST_POSITIONS} of {len(grid.positions)} positions")
    width = max(460, _LEFT + _RIGHT + 74 * len(columns))
    height = max(240, _TOP + _BOTTOM + 26 * len(grid.rows))
    dress(
        figure,
        theme,
        title=label(grid.name),
        subtitle=", ".join(said),
        width=width,
        height=height,
    )
    figure.update_xaxes(title_text="token", type="category", tickangle=-45, showgrid=False)
    figure.update_yaxes(
        title_text="read after", type="category", autorange="reversed", showgrid=False
    )
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
    )
    return figure


def _hovers(grid: LensGrid, first: int) -> list[list[str]]:
    """Everything that is known of each cell."""
    rows = []
    for row, name in enumerate(grid.rows):
        cells = []
        for at in range(first, len(grid.positions)):
            lines = [f"<b>{name}</b>, position {grid.positions[at]} {label(grid.tokens[at], 20)}"]
            lines += [
                f"{probability:.3f} {label(str(text), 20)}"
                for text, probability in zip(
                    grid.texts[row, at], grid.probabilities[row, at], strict=True
                )
            ]
            rank = int(grid.target_rank[row, at]) + 1
            chance = float(grid.target_probability[row, at])
            lines.append(f"{label(grid.target_texts[at], 20)}: place {rank}, {chance:.3g}")
            lines.append(f"KL from the model {grid.kl[row, at]:.3g} nats")
            cells.append("<br>".join(lines))
        rows.append(cells)
    return rows
