"""Plots of weights: composition as matrix and graph, similarity, singular values, eigenvalues."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.figure import (
    SEQUENTIAL,
    STYLES,
    Figure,
    Style,
    Theme,
    colour_bar,
    dress,
    label,
    layer_colours,
    layer_marker,
)
from headscope.table import HeadEigenvalues, HeadScores, HeadSimilarity, HeadSpectra, PairScores

_WIDTHS = (0.9, 1.8, 3.0, 4.5)
_SIDE = {"Q": -0.3, "K": 0.0, "V": 0.3}  # curves of one pair must not hide each other
_BEND = np.linspace(0, 1, 17)


class _Edge(NamedTuple):
    value: float
    mode: str
    first: HeadIndex
    second: HeadIndex


@checked
def composition_graph(
    scores: PairScores | Sequence[PairScores],
    *,
    threshold: float | None = None,
    most: int = 40,
    nodes: HeadScores | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Draw heads by layer, layer 0 at the bottom, with curves between the strongest pairs.

    Args:
        scores: one kind of composition, or several, each in its own colour.
        threshold: smallest value to draw; default: limited by ``most`` only.
        most: number of pairs to draw, the strongest.
        nodes: score that colours the heads.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if there are no scores, or they belong to different models.

    Example:
        >>> figure = hs.plots.composition_graph(hs.circuits.composition(model, "K"))
        >>> type(figure).__name__
        'Figure'
    """
    kinds = [scores] if isinstance(scores, PairScores) else list(scores)
    if not kinds or len({one.values.shape for one in kinds}) > 1:
        raise InputError("a composition graph needs pair scores, all of one model.")
    layers, heads = kinds[0].values.shape[:2]
    if nodes is not None and nodes.mean.shape != (layers, heads):
        raise InputError(f"{nodes.name!r} and {kinds[0].name!r} are not of one model.")
    edges, above = _strongest(kinds, threshold, most)
    style = STYLES[theme]
    figure = Figure()
    modes = list(dict.fromkeys(_mode(one) for one in kinds))
    for mode in modes:
        _add_curves(figure, [edge for edge in edges if edge.mode == mode], edges, mode, style)
    figure.add_trace(_middles(edges))
    figure.add_trace(_heads(kinds[0], edges, nodes, style))
    words = f"the {len(edges)} strongest" if len(edges) < above else f"{len(edges)}"
    said = [label(kinds[0].provenance.model), f"{words} of {above} pairs"]
    said.append("" if not edges else f"from {edges[-1].value:.3f} to {edges[0].value:.3f}")
    dress(
        figure,
        theme,
        title=f"composition: {', '.join(label(mode) for mode in modes)}",
        subtitle=", ".join(part for part in said if part),
        width=int(min(1100, max(480, 62 * heads + 190))),
        height=int(min(900, max(340, 62 * layers + 190))),
    )
    common = {"showgrid": False, "zeroline": False}
    figure.update_xaxes(
        title_text="head", range=[-0.7, heads - 0.3], dtick=_step(heads), tick0=0, **common
    )
    figure.update_yaxes(
        title_text="layer", range=[-0.4, layers - 0.6], dtick=_step(layers), tick0=0, **common
    )
    figure.update_layout(
        showlegend=len(modes) > 1,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        hovermode="closest",
        margin={"l": 60, "r": 100 if nodes is not None else 40, "t": 92, "b": 56},
    )
    return figure


def _mode(scores: PairScores) -> str:
    """Shorten ``K_composition`` to ``K``."""
    return scores.name.partition("_")[0]


def _strongest(
    kinds: Iterable[PairScores], threshold: float | None, most: int
) -> tuple[list[_Edge], int]:
    """Edges to draw, strongest first, and the number of existing pairs."""
    found: list[_Edge] = []
    total = 0
    for one in kinds:
        total += int(one.present.sum())
        found += [_Edge(value, _mode(one), a, b) for a, b, value in one.top(most)]
    kept = [edge for edge in found if threshold is None or edge.value >= threshold]
    return sorted(kept, key=lambda edge: (-edge.value, edge.first, edge.second))[:most], total


def _add_curves(
    figure: go.Figure, mine: list[_Edge], every: list[_Edge], mode: str, style: Style
) -> None:
    """Add one trace per width (a trace has a single width), and one for the legend."""
    colour = style.modes.get(mode, style.accent)
    low, high = (every[-1].value, every[0].value) if every else (0.0, 1.0)
    by_width: dict[int, list[_Edge]] = {}
    for edge in mine:
        part = (edge.value - low) / (high - low) if high > low else 1.0
        by_width.setdefault(round(part * (len(_WIDTHS) - 1)), []).append(edge)
    figure.add_trace(  # in the legend for all of them
        go.Scatter(
            x=[np.nan],
            y=[np.nan],
            mode="lines",
            name=label(mode),
            legendgroup=mode,
            line={"width": 3, "color": colour},
        )
    )
    for width, edges in sorted(by_width.items()):
        points = np.concatenate([np.vstack([_curve(edge), [np.nan, np.nan]]) for edge in edges])
        figure.add_trace(
            go.Scatter(
                x=points[:, 0].round(3),
                y=points[:, 1].round(3),
                mode="lines",
                legendgroup=mode,
                showlegend=False,
                line={"width": _WIDTHS[width], "color": colour},
                opacity=0.75,
                hoverinfo="skip",
            )
        )


def _curve(edge: _Edge) -> Float[np.ndarray, "point 2"]:
    """Points of a smooth curve that leaves upwards and arrives from below."""
    start = np.array([edge.first.head, edge.first.layer], dtype=float)
    end = np.array([edge.second.head, edge.second.layer], dtype=float)
    rise = end[1] - start[1]
    bow = _SIDE.get(edge.mode, 0.0)
    if abs(end[0] - start[0]) < 0.5 and rise > 1:
        bow += 0.55  # else it would run through the heads in between
    near = start + np.array([bow, 0.45 * rise])
    far = end + np.array([bow, -0.45 * rise])
    t = _BEND[:, None]
    curve: np.ndarray = (
        (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * near + 3 * (1 - t) * t**2 * far + t**3 * end
    )
    return curve


def _middles(edges: list[_Edge]) -> go.Scatter:
    """Add invisible points with the hover text of the edges."""
    middle = np.array([_curve(edge)[len(_BEND) // 2] for edge in edges]).reshape(-1, 2)
    return go.Scatter(
        x=middle[:, 0].round(3),
        y=middle[:, 1].round(3),
        mode="markers",
        text=[f"{edge.first} -{label(edge.mode)}-> {edge.second}" for edge in edges],
        customdata=[edge.value for edge in edges],
        hovertemplate="<b>%{text}</b> %{customdata:.3f}<extra></extra>",
        marker={"size": 14, "color": "rgba(0,0,0,0)"},
        showlegend=False,
    )


def _heads(
    scores: PairScores, edges: list[_Edge], nodes: HeadScores | None, style: Style
) -> go.Scatter:
    """Add every head as a point; those with a drawn edge are labelled."""
    layers, heads = scores.values.shape[:2]
    places = [HeadIndex(i, j) for i in range(layers) for j in range(heads)]
    touched = {head for edge in edges for head in (edge.first, edge.second)}
    marker: dict[str, object] = {
        "size": [13 if head in touched else 7 for head in places],
        "color": [style.accent if head in touched else style.missing for head in places],
        "line": {"width": 1, "color": style.paper if nodes is None else style.muted},
    }
    hover = "<b>%{customdata}</b><extra></extra>"
    if nodes is not None:
        low, high = float(np.nanmin(nodes.mean)), float(np.nanmax(nodes.mean))
        reach = max(-low, high)
        marker |= {
            "color": [float(nodes.mean[head]) for head in places],
            "colorscale": style.diverging if nodes.signed else SEQUENTIAL,
            "cmin": -reach if nodes.signed else low,
            "cmax": reach if nodes.signed else high,
            "colorbar": {"title": {"text": label(nodes.name), "side": "right"}, "thickness": 12},
        }
        hover = f"<b>%{{customdata}}</b> {label(nodes.name)} %{{marker.color:.3g}}<extra></extra>"
    return go.Scatter(
        x=[head.head for head in places],
        y=[head.layer for head in places],
        mode="markers+text",
        text=[str(head) if head in touched else "" for head in places],
        textposition="bottom center",
        textfont={"size": 10},
        customdata=[str(head) for head in places],
        hovertemplate=hover,
        marker=marker,
        cliponaxis=False,
        showlegend=False,
    )


def _step(n: int) -> int:
    return max(1, -(-n // 16))


def block_max(
    cells: Float[np.ndarray, "row column"], block: int
) -> Float[np.ndarray, "down across"]:
    """Maximum of every block x block square; the last ones may be smaller."""
    if block == 1:
        return cells
    for axis in (0, 1):
        cells = np.maximum.reduceat(cells, np.arange(0, cells.shape[axis], block), axis)
    return cells


_MOST_CELLS = 512  # a side; above, every cell stands for a block of heads


@checked
def composition_matrix(
    scores: PairScores, *, limits: tuple[float, float] | None = None, theme: Theme = "light"
) -> go.Figure:
    """Plot pair scores: earlier heads downwards, later heads to the right.

    Impossible pairs stay empty. Beyond 512 heads a side each cell is the maximum of a block of
    pairs, and the subtitle says so.

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
            colorbar=colour_bar(label(scores.unit)),
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
    """Tick labels: every head if there is room, else the first head of every layer."""
    if len(names) <= 40:
        return {"tickvals": list(range(len(names))), "ticktext": names}
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        seen.setdefault(name.partition("H")[0], at)
    step = -(-len(seen) // 40)
    shown = list(seen.items())[::step]
    return {"tickvals": [at for _, at in shown], "ticktext": [layer for layer, _ in shown]}


@checked
def head_similarity(similarity: HeadSimilarity, *, theme: Theme = "light") -> go.Figure:
    """Plot the similarity of every pair of heads, ordered by cluster.

    Within a model the dendrogram is drawn beside the rows. Beyond 512 heads a side each cell is the
    most similar pair of a block.

    Args:
        similarity: from :func:`headscope.similarity.heads`.
        theme: ``light`` or ``dark``.

    Example:
        >>> likeness = hs.similarity.heads(model, probe, "pattern")
        >>> type(hs.plots.head_similarity(likeness)).__name__
        'Figure'
    """
    rows, columns = similarity.order(), similarity.order(columns=True)
    cells = similarity.values[np.ix_(rows, columns)]
    names = [
        [str(heads[at]) for at in order]
        for heads, order in ((similarity.first, rows), (similarity.second, columns))
    ]
    lower = similarity.direction == "lower"
    block = -(-max(*cells.shape, 1) // _MOST_CELLS)
    if block > 1:
        sign = -1.0 if lower else 1.0
        cells = sign * block_max(np.where(np.isnan(cells), -np.inf, sign * cells), block)
        cells[np.isinf(cells)] = np.nan
    shown = [some[::block] for some in names]
    scale = [(1 - at, colour) for at, colour in SEQUENTIAL[::-1]] if lower else SEQUENTIAL
    figure = Figure(
        go.Heatmap(
            z=cells.astype(np.float32),
            x=list(range(cells.shape[1])),
            y=list(range(cells.shape[0])),
            customdata=[[f"{one} and {other}" for other in shown[1]] for one in shown[0]],
            hovertemplate="<b>%{customdata}</b> %{z:.3f}<extra></extra>",
            colorscale=scale,
            colorbar={"title": {"text": label(similarity.unit), "side": "right"}, "thickness": 14},
        )
    )
    side = 0.2 if similarity.within and block == 1 and len(rows) > 1 else 0.0
    if side:
        figure.add_trace(_dendrogram(similarity, STYLES[theme]))
    cell = min(30.0, max(2.0, 520 / max(*cells.shape, 1)))
    said = (
        label(similarity.models[0])
        if similarity.within
        else "rows {}, columns {}".format(*map(label, similarity.models))
    )
    most = f"; most alike of {block} x {block} pairs" if block > 1 else ""
    subtitle = f"{said}; bright: alike{most}"
    dress(
        figure,
        theme,
        title=label(similarity.name.replace("_", " ")),
        subtitle=subtitle,
        width=int(max(460, (cell * cells.shape[1] + 40) / (1 - side) + 170)),
        height=int(max(300, cell * cells.shape[0] + 160)),
    )
    common = {"showgrid": False, "zeroline": False}
    down = [cells.shape[0] - 0.5, -0.5]
    figure.update_layout(
        xaxis={"domain": [side, 1.0], "tickangle": -60, **common, **_ticks(shown[1])},
        yaxis={"range": down, "anchor": "x", **common, **_ticks(shown[0])},
        margin={"l": 70, "r": 100, "t": 74, "b": 70},
        showlegend=False,
    )
    if side:
        bare = {"tickvals": [], "ticktext": [], **common}
        reach = float(similarity.linkage()[-1, 2]) * 1.05 or 1.0
        figure.update_layout(
            xaxis2={"domain": [0.0, side - 0.08], "range": [reach, 0.0], "anchor": "y2", **bare},
            yaxis2={"range": down, "anchor": "x2", **bare},
        )
    return figure


def _dendrogram(similarity: HeadSimilarity, style: Style) -> go.Scatter:
    """Dendrogram as brackets, leaves at the rows of the heatmap, distant merges to the left."""
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(similarity.linkage(), no_plot=True)
    ends = np.full((len(drawn["icoord"]), 5), np.nan)
    far = ends.copy()
    ends[:, :4] = (np.array(drawn["icoord"]) - 5) / 10
    far[:, :4] = drawn["dcoord"]
    return go.Scatter(
        x=far.ravel(),
        y=ends.ravel(),
        xaxis="x2",
        yaxis="y2",
        mode="lines",
        line={"width": 1.2, "color": style.accent},
        hoverinfo="skip",
    )


@checked
def head_map(similarity: HeadSimilarity, clusters: int = 0, *, theme: Theme = "light") -> go.Figure:
    """Plot heads as points on a map of their distances, coloured by layer or by cluster.

    Args:
        similarity: within one model, from :func:`headscope.similarity.heads`.
        clusters: colour by this many clusters; 0: by layer.
        theme: ``light`` or ``dark``.

    Example:
        >>> likeness = hs.similarity.heads(model, probe, "pattern")
        >>> len(hs.plots.head_map(likeness).data[0].x) == len(model.shape.heads)
        True
    """
    points = similarity.embed(2)
    colour = [head.layer for head in similarity.first]
    marker = layer_marker(max(colour) + 1, theme)
    if clusters:
        found = similarity.clusters(clusters)
        number = {head: at for at, some in enumerate(found) for head in some}
        colour = [number[head] for head in similarity.first]
        marker = layer_marker(len(found), theme)
        marker["colorbar"]["title"]["text"] = "cluster"
    style = STYLES[theme]
    figure = Figure(
        go.Scatter(
            x=points[:, 0],
            y=points[:, 1],
            mode="markers+text" if len(points) <= 60 else "markers",
            text=_names_near(points, [str(head) for head in similarity.first]),
            textposition="top center",
            textfont={"size": 10, "color": style.text},
            customdata=[str(head) for head in similarity.first],
            hovertemplate="<b>%{customdata}</b><extra></extra>",
            cliponaxis=False,
            marker={"size": 9, "color": colour, "line": {"width": 0.5, "color": style.paper}}
            | marker,
        )
    )
    dress(
        figure,
        theme,
        title=f"heads by {label(similarity.name.replace('_', ' '))}",
        subtitle=f"{label(similarity.models[0])}; {similarity.explained():.0%} of the distances",
        width=600,
        height=520,
    )
    figure.update_xaxes(title_text="", showticklabels=False, zeroline=False)
    figure.update_yaxes(title_text="", showticklabels=False, zeroline=False, scaleanchor="x")
    figure.update_layout(margin={"l": 40, "r": 100, "t": 74, "b": 40})
    return figure


def _names_near(points: Float[np.ndarray, "head 2"], names: list[str]) -> list[str]:
    """Label of each point; close points share the labels at their topmost."""
    near = 0.05 * float(np.ptp(points, axis=0).max() or 1.0)
    shown, left = [""] * len(names), list(np.argsort(-points[:, 1], kind="stable"))
    while left:
        first = left[0]
        group = [at for at in left if np.abs(points[at] - points[first]).max() <= near]
        shown[first] = ", ".join(names[at] for at in sorted(group))
        left = [at for at in left if at not in group]
    return shown


_FLOOR = 1e-3  # smaller values are rounding, or not worth the room on a logarithmic axis


@checked
def spectra(
    values: HeadSpectra,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    named: int = 3,
    theme: Theme = "light",
) -> go.Figure:
    """Plot the singular values of every head, one line each, coloured by layer.

    Each head is drawn in units of the largest singular value expected of random factors of its own
    shape and variance, so that one band serves all: values above it were learned.

    Args:
        values: from :func:`headscope.circuits.spectra`.
        heads: heads to draw in colour, the others in grey; default: all in colour.
        named: number of heads with the largest first value to label.
        theme: ``light`` or ``dark``.

    Example:
        >>> type(hs.plots.spectra(hs.circuits.spectra(model))).__name__
        'Figure'
    """
    style = STYLES[theme]
    relative = np.where(values.relative >= _FLOOR, values.relative, np.nan)
    layers, n_heads, rank = relative.shape
    chosen = None if heads is None else {HeadIndex.parse(head) for head in heads}
    colours = layer_colours(layers, theme)
    place = np.arange(1, rank + 1)
    figure = Figure(
        go.Scatter(
            x=np.concatenate([place, place[::-1]]),
            y=np.concatenate([values.high, values.low[::-1]]).clip(_FLOOR),
            mode="lines",
            fill="toself",
            fillcolor=style.missing,
            opacity=0.6,
            line={"width": 0, "color": "rgba(0,0,0,0)"},
            hoverinfo="skip",
        )
    )
    for layer in range(layers):
        for mine in (False, True):
            some = [
                head
                for head in range(n_heads)
                if (chosen is None or (layer, head) in chosen) is mine
                and np.isfinite(relative[layer, head]).any()
            ]
            if some:
                colour = colours[layer] if mine else style.muted
                figure.add_trace(_lines(relative, layer, some, colour, 1.4 if mine else 0.6))
    for edge in (values.low, values.high):
        dots = {"width": 1, "color": style.text, "dash": "dot"}
        figure.add_trace(
            go.Scatter(x=place, y=edge.clip(_FLOOR), mode="lines", line=dots, hoverinfo="skip")
        )
    figure.add_trace(_names(relative, named, chosen, layer_marker(layers, theme)))
    dress(
        figure,
        theme,
        title=f"{label(values.name)} singular values",
        subtitle=f"{label(values.provenance.model)}; grey band: {label(values.chance, 90)}",
        width=720,
        height=460,
    )
    figure.update_xaxes(title_text="place", range=[0, rank + 1], zeroline=False)
    figure.update_yaxes(
        title_text="singular value / largest by chance",
        type="log",
        zeroline=False,
        **_powers(relative, values),
    )
    figure.update_layout(showlegend=False, margin={"l": 70, "r": 90, "t": 70, "b": 56})
    return figure


def _lines(
    relative: np.ndarray, layer: int, heads: list[int], colour: str, width: float
) -> go.Scatter:
    """All heads of one layer as one trace, with gaps between heads."""
    rank = relative.shape[-1]
    gap = np.full((len(heads), 1), np.nan)
    place = np.broadcast_to(np.arange(1, rank + 1), (len(heads), rank))
    return go.Scatter(
        x=np.hstack([place, gap]).ravel(),
        y=np.hstack([relative[layer, heads], gap]).ravel().astype(np.float32),
        customdata=np.repeat(np.array(heads, dtype=np.int32), rank + 1),
        hovertemplate=f"<b>L{layer}H%{{customdata}}</b><br>place %{{x}}: %{{y:.3g}}<extra></extra>",
        mode="lines",
        line={"width": width, "color": colour},
        connectgaps=False,
    )


def _names(
    relative: np.ndarray, named: int, chosen: set[HeadIndex] | None, marker: dict[str, object]
) -> go.Scatter:
    """Labels at the first values of outstanding heads, and the colour bar of all layers."""
    first = relative[..., 0]
    known = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(np.isfinite(first))]
    known = [head for head in known if chosen is None or head in chosen]
    shown: list[HeadIndex] = []
    for head in sorted(known, key=lambda head: (-first[head], head)):
        room = 0.04 * np.log(np.nanmax(relative) / np.nanmin(relative))
        if len(shown) < named and all(np.log(first[one] / first[head]) > room for one in shown):
            shown.append(head)
    points = max(1, len(shown))
    return go.Scatter(
        x=[1.0] * points,
        y=[float(first[head]) for head in shown] or [np.nan],
        text=[str(head) for head in shown] or [""],
        mode="markers+text",
        textposition="top right",
        textfont={"size": 11},
        cliponaxis=False,
        hoverinfo="skip",
        marker=marker | {"color": [0] * points, "opacity": 0},
    )


def _powers(relative: np.ndarray, values: HeadSpectra) -> dict[str, object]:
    """Ticks at 1, 2 and 5 of every power of ten in range."""
    seen = np.concatenate([relative[np.isfinite(relative)], values.high, values.low.clip(_FLOOR)])
    steps = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    shown = [step for step in steps if seen.min() / 1.5 <= step <= seen.max() * 1.5]
    return {"tickvals": shown, "ticktext": [f"{step:g}" for step in shown]}


_MOST_POINTS = 10_000


@checked
def eigenvalues(
    values: HeadEigenvalues,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Plot eigenvalues, each divided by the largest modulus of its head, coloured by layer.

    On the right (positive) a token raises its own logit (OV) or attends to its own like (QK); on
    the left it lowers or avoids it; off the axis, tokens are mapped to others. In models with more
    than 10000 eigenvalues only the heads whose sum is farthest from 0 are drawn.

    Args:
        values: from :func:`headscope.circuits.eigenvalues`.
        heads: only these heads.
        theme: ``light`` or ``dark``.

    Example:
        >>> type(hs.plots.eigenvalues(hs.circuits.eigenvalues(model))).__name__
        'Figure'
    """
    style = STYLES[theme]
    layers, n_heads, rank = values.values.shape
    chosen = _chosen(values, heads)
    shown = values.relative[tuple(np.array(chosen).reshape(-1, 2).T)]
    circle = np.linspace(0, 2 * np.pi, 181)
    figure = Figure(
        go.Scatter(
            x=np.cos(circle),
            y=np.sin(circle),
            mode="lines",
            line={"color": style.muted, "width": 1},
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=shown.real.ravel().astype(np.float32),
            y=shown.imag.ravel().astype(np.float32),
            mode="markers",
            customdata=np.repeat(np.array(chosen, dtype=np.int32).reshape(-1, 2), rank, axis=0),
            hovertemplate="<b>L%{customdata[0]}H%{customdata[1]}</b><br>"
            "%{x:.3f} + %{y:.3f}i<extra></extra>",
            marker={
                "size": 7 if shown.size < 500 else 4,
                "opacity": 0.9 if shown.size < 500 else 0.6,
                "color": np.repeat([head.layer for head in chosen], rank),
                **layer_marker(layers, theme),
            },
        )
    )
    if len(chosen) == 1:
        who = f"{chosen[0]}, ratio {values.ratio[chosen[0]]:.2f}"
    else:
        who = f"{len(chosen)} of {layers * n_heads} heads"
    parts = [label(values.provenance.model), who, label(values.description)]
    dress(
        figure,
        theme,
        title=f"{label(values.name)} eigenvalues",
        subtitle=", ".join(part for part in parts if part),
        width=540,
        height=516,
    )
    figure.update_xaxes(title_text="real part / largest modulus", range=[-1.08, 1.08], dtick=None)
    figure.update_yaxes(
        title_text="imaginary part", range=[-1.08, 1.08], scaleanchor="x", constrain="domain"
    )
    figure.update_layout(showlegend=False, margin={"l": 70, "r": 90, "t": 76, "b": 60})
    return figure


def _chosen(
    values: HeadEigenvalues, heads: "Iterable[str | tuple[int, int]] | None"
) -> list[HeadIndex]:
    ratio, rank = values.ratio, values.values.shape[-1]
    if heads is not None:
        chosen = [HeadIndex.parse(head) for head in heads]
        if not chosen:
            raise InputError("no heads to draw: name at least one.")
        for head in chosen:
            if head.layer >= ratio.shape[0] or head.head >= ratio.shape[1]:
                raise InputError(f"there is no head {head} among these eigenvalues.")
        return chosen
    known = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(np.isfinite(ratio))]
    strongest = sorted(known, key=lambda head: (-abs(ratio[head]), head))
    return sorted(strongest[: max(1, _MOST_POINTS // rank)])
