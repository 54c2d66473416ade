"""Plots of edges: circuits as layered graphs of heads and MLPs, and faithfulness curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.curves import LINE_COLOURS, faint
from headscope.plots.figure import (
    STYLES,
    Figure,
    Style,
    Theme,
    dress,
    joined_lines,
    label,
    legend_line,
)
from headscope.table import Circuit, Edge, EdgeGraph, Faithfulness, Wiring
from headscope.table.edges import HeadAt, PositionCircuit

_WIDTHS = (0.6, 1.2, 2.2, 3.6, 5.4)
_OPACITY = (0.35, 0.45, 0.6, 0.8, 0.95)
_BEND = np.linspace(0, 1, 17)
_SLOTS = ("query", "key", "value", "mlp", "output")
_STEPS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


@checked
def circuit_graph(
    found: EdgeGraph | Circuit, *, most: int = 300, theme: Theme = "light"
) -> go.Figure:
    """Draw edges between embedding, heads, MLPs and output: layers upwards, heads to the right.

    The width of an edge shows the size of its score (square root, in five steps), and its colour
    the slot that it enters. Hovering over its middle shows both ends and the number. The slider
    hides edges below a share of the largest score.

    Args:
        found: scores of all edges, or a circuit, of which only its own edges are drawn.
        most: number of edges to draw, by magnitude.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if ``most`` is below 1.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> type(hs.plots.circuit_graph(graph, most=30)).__name__
        'Figure'
    """
    if most < 1:
        raise InputError(f"most={most}: give 1 or more.")
    style, wiring = STYLES[theme], found.wiring
    edges, total = _drawn(found, most)
    figure = Figure()
    colours = _colours(style)
    for slot in _SLOTS:
        _add_slot(figure, [one for one in edges if one.edge.slot == slot], slot, colours[slot])
    figure.add_trace(_nodes(wiring, edges, style))
    figure.add_trace(_middles(edges))
    said = [label(found.provenance.model), f"{len(edges)} of {total:,} edges", found.method]
    width = 78 * (wiring.n_heads + 1) + 170
    dress(
        figure,
        theme,
        title="circuit" if isinstance(found, Circuit) else f"edges by {label(found.method)}",
        subtitle=", ".join(label(part) for part in said if part),
        width=int(min(1300, max(560, width))),
        height=int(min(1148, max(468, 66 * (wiring.n_layers + 1) + 248))),
    )
    _dress_axes(figure, wiring)
    if len(edges) > 1:
        figure.update_layout(sliders=[_slider(figure, style)])
    return figure


@dataclass(frozen=True)
class _DrawnEdge:
    """An edge with its score, its share of the largest, and the points of its curve."""

    edge: Edge
    score: float
    share: float
    curve: Float[np.ndarray, "point 2"]


def _drawn(found: EdgeGraph | Circuit, most: int) -> tuple[list[_DrawnEdge], int]:
    """Edges to draw, largest first, and the total number."""
    if isinstance(found, Circuit):
        scores = np.where(np.isnan(found.changes), 1.0, found.changes)
        places = np.flatnonzero(found.kept)
    else:
        scores, places = np.nan_to_num(found.mean), np.arange(len(found.wiring))
        places = places[scores != 0]
    order = places[np.argsort(-np.abs(scores[places]), kind="stable")][:most]
    largest = float(np.abs(scores[order]).max(initial=0.0)) or 1.0
    where = _places(found.wiring)
    edges = []
    for at in order.tolist():
        edge = found.wiring.edges[at]
        curve = _curve(where[edge.source], where[edge.target], edge.slot)
        score = float(scores[at])
        edges.append(_DrawnEdge(edge, score, abs(score) / largest, curve))
    return edges, len(places)


def _colours(style: Style) -> dict[str, str]:
    modes = style.modes
    return {
        "query": modes["Q"],
        "key": modes["K"],
        "value": modes["V"],
        "mlp": "#9467bd",
        "output": style.text,
    }


def _places(wiring: Wiring) -> dict[str, tuple[float, float]]:
    """Position of every node: heads of a layer side by side, its MLP above and to their right."""
    middle = (wiring.n_heads - 1) / 2
    found = {"embed": (middle, -1.0), "logits": (middle, float(wiring.n_layers) + 0.2)}
    for layer in range(wiring.n_layers):
        for head in range(wiring.n_heads):
            found[str(HeadIndex(layer, head))] = (float(head), float(layer))
        rise = 0.0 if wiring.parallel[layer] else 0.4
        found[f"MLP{layer}"] = (wiring.n_heads + 0.3, layer + rise)
    return found


def _curve(
    start: tuple[float, float], end: tuple[float, float], slot: str
) -> Float[np.ndarray, "point 2"]:
    """Points of a curve that leaves upwards and arrives from below at its slot."""
    aside = {"query": -0.16, "value": 0.16}.get(slot, 0.0)
    a, b = np.array(start), np.array([end[0] + aside, end[1]])
    bow = np.array([0.0, 0.45 * (b[1] - a[1])])
    t = _BEND[:, None]
    near, far = a + bow, b - bow
    curve: np.ndarray = (
        (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * near + 3 * (1 - t) * t**2 * far + t**3 * b
    )
    return curve


def _step(share: float) -> int:
    """Highest slider threshold that an edge passes."""
    return int(np.searchsorted(_STEPS, share, side="right")) - 1


def _add_slot(figure: go.Figure, edges: Sequence[_DrawnEdge], slot: str, colour: str) -> None:
    """Add one trace per width and threshold, and one for the legend."""
    figure.add_trace(legend_line(slot, colour))
    grouped: dict[tuple[int, int], list[np.ndarray]] = {}
    for one in edges:
        width = min(len(_WIDTHS) - 1, int(one.share**0.5 * len(_WIDTHS)))
        grouped.setdefault((width, _step(one.share)), []).append(one.curve)
    for (width, step), curves in sorted(grouped.items()):
        lines = joined_lines(curves, slot, _WIDTHS[width], colour, _OPACITY[width])
        figure.add_trace(lines.update(meta=step))


def _nodes(wiring: Wiring, edges: Sequence[_DrawnEdge], style: Style) -> go.Scatter:
    """Add every node; nodes without a drawn edge are faint and unlabelled."""
    touched = {name for one in edges for name in (one.edge.source, one.edge.target)}
    sums: dict[str, float] = {}
    for one in edges:
        sums[one.edge.source] = sums.get(one.edge.source, 0.0) + one.score
    where = _places(wiring)
    return go.Scatter(
        x=[where[name][0] for name in where],
        y=[round(where[name][1], 3) for name in where],
        mode="markers+text",
        text=[name if name in touched else "" for name in where],
        textposition="top center",
        textfont={"size": 10, "color": style.text},
        customdata=[f"{sums[name]:.4g}" if name in sums else "none drawn" for name in where],
        hovertext=list(where),
        hovertemplate="<b>%{hovertext}</b><br>sum of edges out: %{customdata}<extra></extra>",
        marker={
            "size": [9 if name in touched else 5 for name in where],
            "color": [style.accent if name in touched else style.grid for name in where],
            "line": {"width": 1, "color": style.paper},
        },
        showlegend=False,
    )


def _middles(edges: Sequence[_DrawnEdge]) -> go.Scatter:
    """Add invisible points with the hover text of the edges."""
    middle = np.array([one.curve[len(_BEND) // 2] for one in edges]).reshape(-1, 2)
    return go.Scatter(
        x=middle[:, 0].round(3),
        y=middle[:, 1].round(3),
        mode="markers",
        text=[f"<b>{one.edge}</b><br>{one.score:.4g}" for one in edges],
        hovertemplate="%{text}<extra></extra>",
        marker={"size": 11, "color": "rgba(0,0,0,0)"},
        showlegend=False,
    )


def _dress_axes(figure: go.Figure, wiring: Wiring) -> None:
    step = -(-wiring.n_layers // 16)
    shown = list(range(0, wiring.n_layers, step))
    heads = list(range(wiring.n_heads))
    figure.update_xaxes(
        tickvals=heads, ticktext=[f"H{head}" for head in heads],
        showgrid=False, zeroline=False, range=[-0.8, wiring.n_heads + 1.0],
    )  # fmt: skip
    figure.update_yaxes(
        title_text="layer", tickvals=[-1, *shown, wiring.n_layers + 0.2],
        ticktext=["input", *map(str, shown), "output"], zeroline=False,
        range=[-1.5, wiring.n_layers + 0.8],
    )  # fmt: skip
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        margin={"l": 66, "r": 24, "t": 92, "b": 118},
    )


def _slider(figure: go.Figure, style: Style) -> dict[str, object]:
    """Slider that hides edges below a share of the largest score."""
    steps = []
    for number, share in enumerate(_STEPS):
        seen = [trace.meta is None or trace.meta >= number for trace in figure.data]
        steps.append(
            {"method": "restyle", "args": [{"visible": seen}], "label": f"{100 * share:g}%"}
        )
    return {
        "active": 0,
        "steps": steps,
        "currentvalue": {"prefix": "edges from ", "suffix": " of the largest"},
        "pad": {"t": 34},
        "len": 0.6,
        "font": {"size": 10, "color": style.text},
    }


@checked
def faithfulness_curves(
    found: Faithfulness | Mapping[str, Faithfulness], *, theme: Theme = "light"
) -> go.Figure:
    """Plot the faithfulness of circuits of the best edges against their size, with random edges.

    The band covers random circuits, from the lowest draw to the highest; dotted lines mark 0 (no
    edges) and 1 (the whole model). Sizes are on a log scale.

    Args:
        found: one curve, or several by name, e.g. for different methods; random edges are those of
            the first.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if there is no curve to plot.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> metric = hs.metrics.logit_difference
        >>> graph = hs.edges.attribute(model, names, metric)
        >>> curve = hs.edges.faithfulness(model, names, metric, graph, sizes=[0.1, 1.0])
        >>> type(hs.plots.faithfulness_curves(curve)).__name__
        'Figure'
    """
    named = {found.method: found} if isinstance(found, Faithfulness) else dict(found)
    if not named:
        raise InputError("there is no curve to draw: give one or more.")
    first = next(iter(named.values()))
    figure = Figure()
    style = STYLES[theme]
    _add_random(figure, first, style)
    for number, (name, curve) in enumerate(named.items()):
        figure.add_scatter(
            x=(100 * curve.sizes).tolist(),
            y=curve.faithfulness.tolist(),
            name=f"{label(name)} (CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f})",
            mode="lines+markers",
            line={"color": LINE_COLOURS[number % len(LINE_COLOURS)], "width": 2},
            customdata=curve.counts.tolist(),
            hovertemplate=f"<b>{label(name)}</b><br>%{{customdata}} edges: %{{y:.3f}}"
            "<extra></extra>",
        )
    for height in (0.0, 1.0):
        figure.add_hline(height, line={"dash": "dot", "width": 1, "color": style.text})
    said = [
        first.provenance.model,
        f"ablation {first.ablation}",
        f"of {first.unit or 'the metric'}",
    ]
    dress(
        figure,
        theme,
        title="faithfulness of circuits",
        subtitle=", ".join(label(part) for part in said if part),
        width=760,
        height=420,
    )
    ticks = [100 * size for size in first.sizes]
    figure.update_xaxes(
        title_text="edges kept (%)", type="log", tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks], zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(title_text="faithfulness", zeroline=False)
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        margin={"l": 70, "r": 240, "t": 76, "b": 60},
    )
    return figure


def _add_random(figure: go.Figure, curve: Faithfulness, style: Style) -> None:
    """Add random circuits: their mean, in a band from the lowest to the highest."""
    x = (100 * curve.sizes).tolist()
    low, high = curve.random.min(0).tolist(), curve.random.max(0).tolist()
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[*low, *high[::-1]], mode="lines", fill="toself",
        fillcolor=faint(style.muted), line={"width": 0, "color": faint(style.muted)},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=curve.random.mean(0).tolist(), mode="lines",
        name=f"random edges ({len(curve.random)} draws)",
        line={"color": style.muted, "width": 2},
        hovertemplate="<b>random</b><br>%{y:.3f}<extra></extra>",
    )  # fmt: skip


@checked
def position_circuit(found: PositionCircuit, *, theme: Theme = "light") -> go.Figure:
    """Heads at positions of a circuit: positions to the right, layers upwards.

    A line leads from each node to that in whose output it was found, wide where its share is large;
    nodes of the first round have a ring. Pruned nodes are faint.

    Args:
        found: result of :func:`headscope.edges.contextual_circuit`.
        theme: ``light`` or ``dark``.

    Example:
        >>> few = hs.probes.pairs(model, "ioi", batch=2)
        >>> found = hs.edges.contextual_circuit(model, few, hs.metrics.logit_difference, rounds=2)
        >>> type(hs.plots.position_circuit(found)).__name__
        'Figure'
    """
    style, nodes = STYLES[theme], found.nodes
    x, y = _spread(nodes)
    figure = Figure()
    for at, target in enumerate(found.targets.tolist()):
        if target >= 0:
            figure.add_scatter(
                x=[x[at], x[target]], y=[y[at], y[target]], mode="lines", hoverinfo="skip",
                line={"width": 1 + 6 * float(found.shares[at]), "color": style.modes["V"]},
                opacity=0.6 if found.kept[at] and found.kept[target] else 0.2,
            )  # fmt: skip
    first = found.rounds == 1
    figure.add_scatter(
        x=x, y=y, mode="markers+text",
        text=[str(node).split("@")[0] for node in nodes], textposition="middle right",
        textfont={"size": 10, "color": style.text},
        customdata=[f"{found.shares[at]:.3g}" for at in range(len(nodes))],
        hovertext=[str(node) for node in nodes],
        hovertemplate="<b>%{hovertext}</b><br>%{customdata}<extra></extra>",
        marker={
            "size": 11, "color": style.accent,
            "opacity": [1.0 if there else 0.3 for there in found.kept.tolist()],
            "line": {"width": [3 if one else 0 for one in first.tolist()], "color": style.text},
        },
    )  # fmt: skip
    said = [
        label(found.provenance.model),
        f"{int(found.kept.sum())} of {len(nodes)} nodes kept",
        f"faithfulness {found.faithfulness:.2f}",
    ]
    shown = sorted({node.pos for node in nodes})
    last = max([len(found.tokens) - 1, *shown], default=0)
    dress(
        figure,
        theme,
        title="heads at positions",
        subtitle=", ".join(part for part in said if part),
        width=int(min(1300, max(520, 52 * (last + 1) + 120))),
        height=460,
    )
    named = bool(found.tokens)
    ticks = list(range(last + 1)) if named else shown
    figure.update_xaxes(
        title_text="position", tickvals=ticks, tickangle=-45, zeroline=False,
        range=[-0.6, last + 1.2],
        ticktext=[f"{at} {label(found.tokens[at], 9)}" if named else str(at) for at in ticks],
    )  # fmt: skip
    figure.update_yaxes(
        title_text="layer", zeroline=False, dtick=1 if max(y, default=0) < 16 else 2
    )
    figure.update_layout(showlegend=False, margin={"l": 60, "r": 24, "t": 76, "b": 96})
    return figure


def _spread(nodes: Sequence[HeadAt]) -> tuple[list[float], list[float]]:
    """Places of nodes; those of one layer and position stand one above the other."""
    taken: dict[tuple[int, int], int] = {}
    x, y = [], []
    for node in nodes:
        place = (node.layer, node.pos)
        taken[place] = taken.get(place, -1) + 1
        x.append(float(node.pos))
        y.append(node.layer + 0.16 * taken[place])
    return x, y
