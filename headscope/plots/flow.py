"""Plots of one prompt: attention, token flow, routes, and lens readings by layer."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8

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
    joined_lines,
    label,
    legend_line,
)
from headscope.plots.weights import block_max
from headscope.table import (
    Attribution,
    Contributions,
    LensGrid,
    RouteEdge,
    RouteNode,
    Routes,
    TokenFlow,
)

_MOST_CELLS = 512  # a side; above, every cell stands for a block of positions
_MOST_EXACT = 64


@checked
def attention_pattern(
    pattern: Float[np.ndarray, "query key"],
    tokens: Sequence[str] | None = None,
    *,
    title: str = "attention",
    theme: Theme = "light",
) -> go.Figure:
    """Plot an attention pattern: queries downwards, keys to the right.

    Colours are quantised to 1/255 of the largest probability, which takes a fifth of the size
    without visible difference; up to 64 positions hovering shows exact values. Beyond 512 positions
    each cell is the maximum of a block of positions, and the title says so.

    Args:
        pattern: attention probabilities; NaN is missing.
        tokens: one text per key position; if there are fewer queries, they are the last ones.
        title: e.g. ``"gpt2 L5H1"``.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if the number of tokens does not fit the pattern.

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
            colorbar=colour_bar("probability")
            | {
                "tickvals": [0, 63.75, 127.5, 191.25, 255],
                "ticktext": [f"{peak * part:.2g}" for part in (0, 0.25, 0.5, 0.75, 1)],
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
    """Distinct label of each row or column: its position, and its token if it is a single one."""
    if block > 1:
        return [f"{start + at}-{start + min(at + block, n) - 1}" for at in range(0, n, block)]
    if tokens is None:
        return [str(at) for at in range(n)]
    return [f"{at} {label(token, 16)}" for at, token in enumerate(tokens)]


_WIDTHS = (0.8, 1.8, 3.2, 5.2)
_BEND = np.linspace(0, 1, 13)
_MOST_COLUMNS = 60
_KINDS = {"attention": "attention", "residual": "residual", "past_mlp": "residual", "mlp": "mlp",
          "reads": "mlp"}  # fmt: skip


@checked
def token_flow(flow: TokenFlow, example: int = 0, *, theme: Theme = "light") -> go.Figure:
    """Plot the share of each input token in each position of one text, padding left out.

    Args:
        flow: such as :func:`headscope.flow.rollout` or :func:`headscope.flow.alti`.
        example: index of the text.
        theme: ``light`` or ``dark``.

    Example:
        >>> figure = hs.plots.token_flow(hs.flow.rollout(model, probe))
        >>> type(figure).__name__
        'Figure'
    """
    _check_example(example, len(flow.real))
    real = np.flatnonzero(flow.real[example])
    cells = flow.matrix[example][np.ix_(real, real)]
    asked = np.flatnonzero(~np.isnan(cells).all(1))
    first = int(asked[0]) if len(asked) else 0
    tokens = [flow.tokens[example][at] for at in real]
    title = f"{flow.name.replace('_', '-')} {flow.provenance.model}"
    figure = attention_pattern(cells[first:], tokens, title=title, theme=theme)
    figure.update_traces(colorbar_title_text="share", selector={"type": "heatmap"})
    figure.update_xaxes(title_text="from input token")
    figure.update_yaxes(title_text="into position")
    return figure


@checked
def mixing_map(
    found: Contributions,
    example: int = 0,
    form: str = "residual",
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Plot the mixing ratio by layer and position: 0 is the token itself, 1 all others.

    Layers upwards, positions of one text to the right, padding left out.

    Args:
        found: from :func:`headscope.flow.norms`.
        example: index of the text.
        form: ``residual``, or ``attention`` for attention's output alone.
        theme: ``light`` or ``dark``.

    Example:
        >>> figure = hs.plots.mixing_map(hs.flow.norms(model, probe))
        >>> type(figure).__name__
        'Figure'
    """
    _check_example(example, len(found.real))
    real = np.flatnonzero(found.real[example])
    cells = found.mixing_of(form)[:, example, real]
    columns = [f"{n} {label(found.tokens[example][at], 12)}" for n, at in enumerate(real)]
    layers = [f"L{n}" for n in range(len(cells))]
    figure = Figure(
        go.Heatmap(
            z=cells[::-1].astype(np.float32),
            x=columns,
            y=layers[::-1],
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            hovertemplate="%{y}, %{x}<br>%{z:.3f} from other positions<extra></extra>",
            colorbar=colour_bar("mixing ratio"),
            xgap=1 if len(real) <= 80 else 0,
            ygap=1,
        )
    )
    said = {"residual": "with the residual stream", "attention": "attention alone"}[form]
    dress(
        figure,
        theme,
        title="mixing ratio",
        subtitle=", ".join(part for part in (label(found.provenance.model), said) if part),
        width=int(min(1200, max(460, 17 * len(real) + 220))),
        height=int(min(900, max(280, 24 * len(layers) + 200))),
    )
    figure.update_xaxes(
        title_text="token", type="category", tickangle=-60, nticks=60, showgrid=False
    )
    figure.update_yaxes(title_text="layer", type="category", autorange="reversed", showgrid=False)
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing, margin={"l": 70, "r": 100, "t": 70, "b": 120}
    )
    return figure


@checked
def route_graph(routes: Routes, *, most: int = 300, theme: Theme = "light") -> go.Figure:
    """Draw a prompt's routes: tokens to the right, layers upwards, width by flow.

    Every layer has two rows, the stream after attention and after the MLP (one in parallel blocks);
    MLPs are beside them. Hovering over the middle of an edge shows its share, its flow, and its
    heads. Biases are not drawn. With more than 40 tokens only those on the route get a column.

    Args:
        routes: from :func:`headscope.flow.routes`.
        most: number of edges to draw, by flow.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if ``most`` is below 1.

    Example:
        >>> routes = hs.flow.routes(model, "The cat sat on the")
        >>> type(hs.plots.route_graph(routes)).__name__
        'Figure'
    """
    if most < 1:
        raise InputError(f"most={most}: give 1 or more.")
    style = STYLES[theme]
    drawable = [edge for edge in routes.edges if edge.kind != "bias" and edge.importance > 0]
    edges = sorted(drawable, key=lambda edge: -edge.importance)[:most]
    columns = _columns(routes, edges)
    figure = Figure()
    for kind, colour in (
        ("residual", style.muted), ("mlp", style.modes["V"]), ("attention", style.accent)
    ):  # fmt: skip
        mine = [edge for edge in edges if _KINDS[edge.kind] == kind]
        _add_edges(figure, mine, kind, colour, columns, routes.parallel)
    figure.add_trace(_nodes(edges, columns, routes, style))
    figure.add_trace(_middles(edges, columns, routes.parallel))
    layers = routes.head_flow.shape[0]
    width = 30 if len(columns) <= 40 else 20
    said = [label(routes.provenance.model)]
    said.append(f"{len(edges)} of {len(drawable)} edges of at least {routes.edge_threshold:g}")
    said.append(f"{routes.bias.sum():.0%} in biases")
    dress(
        figure,
        theme,
        title=f"routes into {routes.position} {label(routes.tokens[-1], 20)}",
        subtitle=", ".join(part for part in said if part),
        width=int(min(1300, max(560, width * len(columns) + 150))),
        height=int(min(1000, max(360, (46 if layers <= 14 else 30) * layers + 210))),
    )
    texts = [f"{at} {label(routes.tokens[at], 12)}" for at in columns]
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=texts, tickangle=-60, showgrid=False,
        zeroline=False, range=[-0.8, len(columns) - 0.2],
    )  # fmt: skip
    step = -(-layers // 16)
    figure.update_yaxes(
        title_text="after layer", tickvals=[0, *range(1, layers + 1, step)],
        ticktext=["input", *map(str, range(0, layers, step))], range=[-0.3, layers + 0.3],
        zeroline=False,
    )  # fmt: skip
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        margin={"l": 66, "r": 30, "t": 92, "b": 110},
    )
    return figure


def _check_example(example: int, count: int) -> None:
    if not 0 <= example < count:
        raise InputError(f"there are {count} texts, and none has number {example}.")


def _columns(routes: Routes, edges: Sequence[RouteEdge]) -> dict[int, int]:
    """Column of each position that has one."""
    touched = {node.pos for edge in edges for node in (edge.source, edge.target)}
    touched.add(len(routes.tokens) - 1)
    few = len(routes.tokens) <= 40
    shown = range(len(routes.tokens)) if few else sorted(touched)[-_MOST_COLUMNS:]
    return {at: column for column, at in enumerate(shown)}


def _place(node: RouteNode, columns: dict[int, int], parallel: bool) -> Float[np.ndarray, "2"]:
    """Position of a node."""
    rise = {"embed": 1.0, "resid_mid": 0.5, "resid_post": 1.0, "mlp_out": 0.5 if parallel else 0.75}
    aside = 0.34 if node.site == "mlp_out" else 0.0
    return np.array([columns[node.pos] + aside, node.layer + rise[node.site]])


def _curve(
    edge: RouteEdge, columns: dict[int, int], parallel: bool
) -> Float[np.ndarray, "point 2"]:
    """Points of a curve that leaves upwards and arrives from below."""
    start, end = (_place(node, columns, parallel) for node in (edge.source, edge.target))
    bow = np.array([0.0, 0.6 * (end[1] - start[1])])
    t = _BEND[:, None]
    near, far = start + bow, end - bow
    curve: np.ndarray = (
        (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * near + 3 * (1 - t) * t**2 * far + t**3 * end
    )
    return curve


def _shown(edges: Sequence[RouteEdge], columns: dict[int, int]) -> list[RouteEdge]:
    return [edge for edge in edges if {edge.source.pos, edge.target.pos} <= columns.keys()]


def _add_edges(
    figure: go.Figure,
    edges: Sequence[RouteEdge],
    kind: str,
    colour: str,
    columns: dict[int, int],
    parallel: bool,
) -> None:
    """Add one trace per width, and one more for the legend."""
    figure.add_trace(legend_line(kind, colour))
    by_width: dict[int, list[np.ndarray]] = {}
    for edge in _shown(edges, columns):
        width = min(len(_WIDTHS) - 1, int(edge.importance**0.5 * len(_WIDTHS)))
        by_width.setdefault(width, []).append(_curve(edge, columns, parallel))
    for width, curves in sorted(by_width.items()):
        figure.add_trace(joined_lines(curves, kind, _WIDTHS[width], colour, 0.8))


def _nodes(
    edges: Sequence[RouteEdge], columns: dict[int, int], routes: Routes, style: Style
) -> go.Scatter:
    """Add every node with a drawn edge."""
    flows: dict[RouteNode, float] = {}
    for edge in _shown(edges, columns):
        flows.setdefault(edge.target, 0.0)
        flows[edge.target] += edge.importance
        flows.setdefault(edge.source, 0.0)
    points = np.array([_place(node, columns, routes.parallel) for node in flows]).reshape(-1, 2)
    return go.Scatter(
        x=points[:, 0].round(3),
        y=points[:, 1].round(3),
        mode="markers",
        text=[f"{node.site} L{node.layer}" if node.layer >= 0 else "input" for node in flows],
        customdata=[f"{node.pos} {label(routes.tokens[node.pos], 20)}" for node in flows],
        hovertemplate="<b>%{text}</b> at %{customdata}<extra></extra>",
        marker={
            "size": [7 if node.site != "mlp_out" else 5 for node in flows],
            "color": [style.modes["V"] if node.site == "mlp_out" else style.text for node in flows],
        },
        showlegend=False,
    )


def _middles(edges: Sequence[RouteEdge], columns: dict[int, int], parallel: bool) -> go.Scatter:
    """Add invisible points with the hover text of the edges."""
    shown = _shown(edges, columns)
    points = [_curve(edge, columns, parallel)[len(_BEND) // 2] for edge in shown]
    middle = np.array(points).reshape(-1, 2)
    return go.Scatter(
        x=middle[:, 0].round(3),
        y=middle[:, 1].round(3),
        mode="markers",
        text=[_told(edge) for edge in shown],
        hovertemplate="%{text}<extra></extra>",
        marker={"size": 12, "color": "rgba(0,0,0,0)"},
        showlegend=False,
    )


def _told(edge: RouteEdge) -> str:
    lines = [f"<b>{edge.kind.replace('_', ' ')}</b>, layer {edge.target.layer}"]
    lines.append(f"share {edge.weight:.3f}, flow {edge.importance:.3g}")
    strongest = sorted(edge.heads.items(), key=lambda item: -item[1])[:8]
    lines += [f"{head} {share:.3f}" for head, share in strongest]
    return "<br>".join(lines)


_MOST_POSITIONS = 40
_MOST_TEXT = 9  # characters that fit a cell
_LEFT, _RIGHT, _TOP, _BOTTOM = 116, 96, 66, 96


@checked
def lens_grid(grid: LensGrid, *, theme: Theme = "light") -> go.Figure:
    """Plot a lens: the most likely token per layer and position, coloured by probability.

    The model's output is on top. Hovering shows the likely tokens with their probabilities, the
    divergence from the model, and the rank of the tracked token. With more than 40 positions the
    last 40 are shown, and the subtitle says so.

    Args:
        grid: readings of a lens.
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
            colorbar=colour_bar("probability"),
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
    """Hover text of each cell."""
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


@checked
def waterfall(split: Attribution, k: int = 14, *, theme: Theme = "light") -> go.Figure:
    """Plot the k largest parts of a logit bottom-up, the rest as one bar, and the total.

    Every bar starts where the previous one ended; colours tell positive from negative parts.

    Args:
        split: attribution of a logit.
        k: number of parts with their own bar.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if k is below 1.

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
        axes=("part", "logits, cumulative"),
        width=max(460, 130 + 40 * len(values)),
        height=420,
    )
    return figure


@checked
def source_bars(
    split: Attribution, head: "str | tuple[int, int] | None" = None, *, theme: Theme = "light"
) -> go.Figure:
    """Plot the contribution of each prompt token to the logit, through one or all heads.

    Args:
        split: attribution with sources.
        head: a single head; default: all heads together.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the attribution has no sources, or lacks this head.

    Example:
        >>> split = hs.lens.attribute(model, "The cat sat on the")
        >>> type(hs.plots.source_bars(split, "L2H1")).__name__
        'Figure'
    """
    if split.sources is None:
        raise InputError("this attribution has no sources: compute it with sources=True.")
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
    """Set titles, axes and the zero line."""
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
