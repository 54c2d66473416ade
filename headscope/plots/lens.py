"""What a lens reads: the most likely token at every layer, and a logit as a sum of parts."""

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.figure import Figure
from headscope.plots.style import SEQUENTIAL, STYLES, Theme, dress, label
from headscope.table import Attribution, LensGrid

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


_MOST_TOKENS = 60


def waterfall(split: Attribution, k: int = 14, *, theme: Theme = "light") -> go.Figure:
    """The k largest parts from the bottom of the model up, the rest as one bar, and the whole.

    Every bar starts where the one before it ended; colours tell what raises and what lowers.

    Args:
        split: of a logit.
        k: number of parts with a bar of their own.
        theme: ``light`` or ``dark``.

    Example:
        >>> split = hs.lens.attribute(model, "The cat sat on the")
        >>> type(hs.plots.waterfall(split)).__name__
        'Figure'
    """
    if k < 1:
        raise InputError(f"a waterfall needs at least one part; got k={k}.")
    style = STYLES[theme]
    largest = {part.name for part in split.top(k)}
    bars = [(part.name, part.value) for part in split if part.name in largest]
    others = [part.value for part in split if part.name not in largest]
    if others:
        bars.append((f"{len(others)} others", float(sum(others))))
    values = np.array([value for _, value in bars])
    ends = values.cumsum()
    up, down = style.diverging[-2][1], style.diverging[1][1]
    figure = Figure(
        go.Bar(
            x=[*(name for name, _ in bars), "logit"],
            y=[*values, split.whole],
            base=[*(ends - values), 0.0],
            marker={"color": [*(up if one >= 0 else down for one in values), style.muted]},
            customdata=[*ends, split.whole],
            hovertemplate="<b>%{x}</b> %{y:+.4g}<br>up to here %{customdata:.4g}<extra></extra>",
        )
    )
    _finish(
        figure,
        theme,
        split,
        [f"position {split.position} {label(split.tokens[-1], 20)}"],
        title=f"logit of {_what(split)}",
        axes=("part", "logits, one part after the other"),
        width=max(460, 130 + 40 * len(values)),
        height=420,
    )
    return figure


def source_bars(
    split: Attribution, head: "str | tuple[int, int] | None" = None, *, theme: Theme = "light"
) -> go.Figure:
    """What heads moved from each token of the prompt to the logit.

    Args:
        split: with sources.
        head: one head; default: all heads together.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the attribution has no sources, or not this head.

    Example:
        >>> split = hs.lens.attribute(model, "The cat sat on the")
        >>> type(hs.plots.source_bars(split, "L2H1")).__name__
        'Figure'
    """
    if split.sources is None:
        raise InputError("this attribution was made without sources: make it with sources=True.")
    style = STYLES[theme]
    if head is None:
        values, who = split.by_source, "all heads"
    else:
        index = HeadIndex.parse(head)
        layers, heads = split.heads.shape
        if not (index.layer < layers and index.head < heads):
            raise InputError(f"there is no head {index} in this attribution.")
        values, who = split.sources[index], str(index)
    first = max(0, len(values) - _MOST_TOKENS)
    names = [f"{at} {label(text, 12)}" for at, text in enumerate(split.tokens)][first:]
    shown = np.nan_to_num(values[first:])
    up, down = style.diverging[-2][1], style.diverging[1][1]
    figure = Figure(
        go.Bar(
            x=names,
            y=shown,
            marker={"color": [up if one >= 0 else down for one in shown]},
            hovertemplate="<b>%{x}</b> %{y:+.4g} logits<extra></extra>",
        )
    )
    said = [f"value of each token moved by {who} to position {split.position}"]
    if first:
        said.append(f"the last {_MOST_TOKENS} tokens")
    _finish(
        figure,
        theme,
        split,
        said,
        title=f"logit of {_what(split)}, by source token",
        axes=("token", "logits"),
        width=max(460, 120 + 30 * len(names)),
        height=380,
    )
    return figure


def _finish(
    figure: go.Figure,
    theme: Theme,
    split: Attribution,
    said: list[str],
    *,
    title: str,
    axes: tuple[str, str],
    width: int,
    height: int,
) -> None:
    """Titles, axes and the line of no effect."""
    model = [label(split.provenance.model)] if split.provenance.model else []
    subtitle = ", ".join([*model, *said])
    dress(figure, theme, title=title, subtitle=subtitle, width=width, height=height)
    figure.add_hline(0.0, line={"dash": "dot", "width": 1, "color": STYLES[theme].text})
    figure.update_xaxes(title_text=axes[0], type="category", tickangle=-60, showgrid=False)
    figure.update_yaxes(title_text=axes[1])
    margin = {"l": 70, "r": 20, "t": 70, "b": 130}
    figure.update_layout(bargap=0.2, showlegend=False, margin=margin)


def _what(split: Attribution) -> str:
    foil = "" if split.foil is None else f" less {label(split.foil, 20)}"
    return f"{label(split.target, 20)}{foil}"
