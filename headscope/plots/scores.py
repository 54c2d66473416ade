"""Plots of scores: heatmaps, rankings, scatter plots, effects on grids."""

import math
from collections.abc import Sequence
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from headscope.base.arguments import checked
from headscope.base.result import counted
from headscope.base.statistics import interval_of_sem, mean_interval, rank_correlation
from headscope.errors import InputError
from headscope.plots.figure import (
    SEQUENTIAL,
    STYLES,
    Figure,
    Theme,
    captioned,
    colour_bar,
    dress,
    label,
    layer_marker,
)
from headscope.table import EffectGrid, HeadScores, HeadTable, RecallGrid
from headscope.table.kinds import notable_heads


@checked
def ranking(
    scores: HeadScores, k: int = 20, *, level: float = 0.95, theme: Theme = "light"
) -> go.Figure:
    """Plot the k best heads as bars, with intervals and the band of the nulls.

    Best means largest, or for a signed score largest in magnitude. The interval is
    ``scores.interval``, or Student's t with the standard error if the examples were not kept. The
    band covers the middle 95% of all heads' means on the control.

    Args:
        scores: one score of a model.
        k: number of bars.
        level: confidence level of the interval.
        theme: ``light`` or ``dark``.

    Example:
        >>> type(hs.plots.ranking(table["induction"], k=5)).__name__
        'Figure'
    """
    style = STYLES[theme]
    chosen = scores.notable(k)
    names = [str(head) for head, _ in chosen]
    means = np.array([mean for _, mean in chosen], dtype=float)
    if scores.examples is None:
        low, high = interval_of_sem(scores.mean, scores.sem, scores.n, level)
    else:
        low, high = scores.interval(level)
    marked = scores.significant()
    figure = Figure(
        go.Bar(
            x=names,
            y=means,
            error_y={
                "type": "data",
                "array": [high[head] - mean for head, mean in chosen],
                "arrayminus": [mean - low[head] for head, mean in chosen],
                "color": style.text,
                "thickness": 1.2,
                "width": 3,
            },
            marker={"color": [style.accent if marked[head] else style.muted for head, _ in chosen]},
            hovertemplate="<b>%{x}</b> %{y:.3g}<extra></extra>",
        )
    )
    said = [label(scores.provenance.model)] if scores.provenance.model else []
    if np.isfinite(scores.p_value).any():
        said.append("grey: not significant")
    if np.isfinite(scores.null).any():
        ends = np.nanquantile(scores.null, [0.025, 0.975])
        figure.add_hrect(*map(float, ends), fillcolor=style.missing, opacity=0.55, line_width=0)
        figure.add_hline(float(np.nanmedian(scores.null)), line={"dash": "dot", "width": 1})
        said.append("band and dotted line: null")
    dress(
        figure,
        theme,
        title=f"{label(scores.name)}: {len(chosen)} best heads",
        subtitle=", ".join(said),
        width=max(420, 130 + 32 * len(chosen)),
        height=380,
    )
    unit = f" ({label(scores.unit)})" if scores.unit else ""
    figure.update_xaxes(title_text="head", type="category", tickangle=-60 if k > 10 else 0)
    figure.update_yaxes(title_text=f"{label(scores.name)}{unit}")
    figure.update_layout(bargap=0.25, showlegend=False, margin={"l": 70, "r": 20, "t": 70, "b": 76})
    figure.update_shapes(line_color=style.text, selector={"type": "line"})
    _captioned(figure, [scores], f"{level:.0%} intervals of the mean")
    return figure


def _captioned(figure: go.Figure, shown: Sequence[HeadScores], drawn: str = "") -> None:
    """Attach the caption: n, method, and for a single score its uncertainty and null."""
    counts = np.concatenate([one.n[np.isfinite(one.mean)] for one in shown])
    low, high = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    n = counted(high) if low == high else f"{low} to {high} examples"
    method = ", ".join(one.name.replace("_", " ") for one in shown[:3])
    method += f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    more = []
    if len(shown) == 1 and not drawn:
        lower, upper = interval_of_sem(shown[0].mean, shown[0].sem, shown[0].n)
        half = (upper - lower)[np.isfinite(upper - lower)] / 2
        more += (
            [f"95% interval of a mean: ±{np.median(half):.2g} (median head)"] if half.size else []
        )
    if len(shown) == 1 and np.isfinite(shown[0].null).any():
        band = np.nanquantile(shown[0].null, [0.025, 0.975])
        more.append(f"null, middle 95% of heads: {band[0]:.2g} to {band[1]:.2g}")
    captioned(
        figure,
        shown[0].provenance,
        n=f"{n} per head",
        method=", ".join(filter(None, [f"mean {method} of each head", drawn])),
        more=more,
    )


@checked
def scatter(a: HeadScores, b: HeadScores, *, named: int = 3, theme: Theme = "light") -> go.Figure:
    """Plot every head's mean on score ``b`` against its mean on score ``a``, coloured by layer.

    The subtitle gives Spearman's rank correlation over heads.

    Args:
        a: score on the horizontal axis.
        b: score on the vertical axis.
        named: number of best heads of each score to label.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if the scores belong to different models.

    Example:
        >>> figure = hs.plots.scatter(table["previous_token"], table["induction"])
        >>> len(figure.data[0].x) == model.shape.n_layers * model.shape.n_heads
        True
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"{a.name!r} and {b.name!r} are not of one model.")
    known = np.isfinite(a.mean) & np.isfinite(b.mean)
    labels = a.labels[known].tolist()
    names = set(map(str, notable_heads([a, b], named)))
    places = _places(a.mean[known], b.mean[known], [one in names for one in labels])
    rho = rank_correlation(a.mean, b.mean)
    style = STYLES[theme]
    figure = Figure(
        go.Scatter(
            x=a.mean[known],
            y=b.mean[known],
            mode="markers+text",
            text=[one if place else "" for one, place in zip(labels, places, strict=True)],
            textposition=[place or "top center" for place in places],
            textfont={"size": 11, "color": style.text},
            cliponaxis=False,
            customdata=labels,
            hovertemplate="<b>%{customdata}</b><br>%{x:.3g}, %{y:.3g}<extra></extra>",
            marker={
                "size": 8,
                "color": np.nonzero(known)[0],
                "line": {"width": 0.5, "color": style.paper},
                **layer_marker(a.mean.shape[0], theme),
            },
        )
    )
    dress(
        figure,
        theme,
        title=f"{label(b.name)} over {label(a.name)}",
        subtitle=f"{int(known.sum())} heads, rank correlation {rho:.2f}",
        width=560,
        height=480,
    )
    for score, update in ((a, figure.update_xaxes), (b, figure.update_yaxes)):
        unit = f" ({label(score.unit)})" if score.unit else ""
        update(title_text=f"{label(score.name)}{unit}", zeroline=score.signed)
    figure.update_layout(margin={"l": 70, "r": 90, "t": 70, "b": 60})
    _captioned(figure, [a, b])
    return figure


def _places(
    x: Float[np.ndarray, " head"], y: Float[np.ndarray, " head"], wanted: list[bool]
) -> list[str]:
    """Label positions, above or below each point; none if both are taken."""
    taken: list[tuple[float, float]] = []
    places = [""] * len(wanted)
    wide, high = (float(np.ptp(side)) or 1.0 if side.size else 1.0 for side in (x, y))
    for i in np.flatnonzero(wanted):
        for place, shift in (("top center", 0.02), ("bottom center", -0.05)):
            at = (float(x[i]) / wide, float(y[i]) / high + shift)
            if all(abs(at[0] - u) > 0.1 or abs(at[1] - v) > 0.04 for u, v in taken):
                taken.append(at)
                places[i] = place
                break
    return places


_CHARACTER = 6.6  # pixels of one character of a label
_MOST_LABEL = 18


def effect_heatmap(
    grid: EffectGrid, *, limits: tuple[float, float] | None = None, theme: Theme = "light"
) -> go.Figure:
    """Plot the mean effect per cell: first axis downwards, second to the right, centred at 0.

    Args:
        grid: effects with one axis (drawn as a row) or two.
        limits: values of the first and last colour; default: plus and minus the largest effect.
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
            colorbar=colour_bar(label(grid.unit)),
            xgap=1,
            ygap=1,
        )
    )
    dress(
        figure,
        theme,
        title=label(grid.name),
        subtitle=_effect_subtitle(grid),
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
    half = np.diff(mean_interval(grid.per_example, 0.95, grid.clusters), axis=0) / 2
    half = half[np.isfinite(half)]
    captioned(
        figure,
        grid.provenance,
        n=counted(len(grid.unedited)),
        method=f"{grid.name}, mean effect of each cell",
        more=[f"95% interval of a mean: ±{np.median(half):.2g} (median cell)"] if half.size else [],
    )
    return figure


def _effect_subtitle(grid: EffectGrid) -> str:
    parts = [label(grid.provenance.model)] if grid.provenance.model else []
    parts.append(f"mean of {counted(len(grid.unedited))}")
    if np.isnan(grid.mean).any():
        parts.append("grey: no value")
    return ", ".join(parts)


_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 96, 66, 50
Limits = tuple[float, float]


@checked
def heatmap(
    scores: HeadScores | HeadTable | EffectGrid,
    *,
    limits: Limits | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Plot every head's mean: layers downwards from 0, heads to the right.

    A signed score is coloured symmetrically about 0; any other from its lower to its upper bound,
    so that two heatmaps of one score can be compared. Grey cells have no value.

    Args:
        scores: one score; a table shows all of its scores, like :func:`heatmaps`; effects on a grid
            of one or two axes (:func:`headscope.patch_activations`) keep their own labels.
        limits: values of the first and last colour.
        theme: ``light`` or ``dark``.

    Returns:
        A plotly figure.

    Raises:
        InputError: if given anything but scores, a table or a grid of effects.

    Example:
        >>> figure = hs.plots.heatmap(table["induction"])
        >>> figure.data[0].z.shape == (model.shape.n_layers, model.shape.n_heads)
        True
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> metric, axes = hs.metrics.logit_difference, ("layer", "position")
        >>> grid = hs.patch_activations(model, names, metric, axes)
        >>> hs.plots.heatmap(grid).layout.yaxis.title.text
        'layer'
    """
    if isinstance(scores, HeadTable):
        return heatmaps(scores, theme=theme)
    if isinstance(scores, EffectGrid):
        return effect_heatmap(scores, limits=limits, theme=theme)
    if not isinstance(scores, HeadScores):
        raise InputError(
            f"a heatmap shows scores, a table or a grid of effects, not a {type(scores).__name__}: "
            "make scores of plain numbers with hs.HeadScores.from_summary."
        )
    layers, heads = scores.mean.shape
    cell = _cell(layers, heads)
    figure = Figure(_trace(scores, limits, theme))
    figure.data[0].colorbar.update(x=1.0, xpad=10, thickness=14, len=1.0)
    _axes(figure, layers, heads, theme)
    width = max(cell * heads + _LEFT + _RIGHT, 380)
    height = cell * layers + _TOP + _BOTTOM
    dress(
        figure,
        theme,
        title=label(scores.name),
        subtitle=_subtitle(scores),
        width=width,
        height=max(height, 220),
    )
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
    )
    _captioned(figure, [scores])
    return figure


@checked
def heatmaps(
    table: HeadTable,
    names: Sequence[str] | None = None,
    *,
    columns: int = 3,
    theme: Theme = "light",
) -> go.Figure:
    """Plot several scores side by side, each with its own colours, as in :func:`heatmap`.

    Args:
        table: scores of one model.
        names: scores to plot, in this order; default: all.
        columns: panels in a row.
        theme: ``light`` or ``dark``.

    Example:
        >>> len(hs.plots.heatmaps(table, ["induction", "previous_token"]).data)
        2
    """
    shown = [table[name] for name in (table if names is None else names)]
    layers, heads = table.shape
    across = min(columns, len(shown))
    down = math.ceil(len(shown) / across)
    cell = max(5, _cell(layers, heads) * 2 // 3)
    panel = (max(cell * heads, 130) + _LEFT + _RIGHT - 10, max(cell * layers, 90) + 84)
    width, height = panel[0] * across, panel[1] * down + 40
    figure = make_subplots(
        figure=Figure(),
        rows=down,
        cols=across,
        subplot_titles=[f"{label(one.name)}{_unit(one)}" for one in shown],
        horizontal_spacing=(_LEFT + _RIGHT - 30) / width if across > 1 else 0,
        vertical_spacing=84 / height if down > 1 else 0,
    )
    for i, one in enumerate(shown):
        row, column = divmod(i, across)
        figure.add_trace(_trace(one, None, theme), row=row + 1, col=column + 1)
        at = figure.get_subplot(row + 1, column + 1)
        x, y = at.xaxis.domain, at.yaxis.domain
        figure.data[i].colorbar.update(
            x=x[1], xpad=6, y=(y[0] + y[1]) / 2, len=y[1] - y[0], thickness=10, title=None
        )
    _axes(figure, layers, heads, theme)
    model = shown[0].provenance.model
    dress(figure, theme, title=label(model) or "scores", subtitle="", width=width, height=height)
    figure.update_annotations(font={"size": 13, "color": STYLES[theme].text}, yshift=3)
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing, margin={"l": _LEFT, "r": 70, "t": 76, "b": _BOTTOM}
    )
    _captioned(figure, shown)
    return figure


def _trace(scores: HeadScores, limits: Limits | None, theme: Theme) -> go.Heatmap:
    """Heatmap trace with hover text."""
    low, high = limits or _limits(scores)
    layers, heads = scores.mean.shape
    kv_head = np.broadcast_to(np.arange(heads) // (heads // scores.kv_heads), (layers, heads))
    columns: list[tuple[str, Float[np.ndarray, "layer head"], str]] = [
        ("KV head", kv_head.astype(float), "d"),
        ("standard error", scores.sem, ".2g"),
        ("null", scores.null, ".3g"),
        ("p, adjusted", scores.p_adjusted, ".1e"),
    ]
    known = [column for column in columns if np.isfinite(column[1]).any()]
    lines = [f"{name} %{{customdata[{i}]:{form}}}" for i, (name, _, form) in enumerate(known)]
    unit = f" {label(scores.unit)}" if scores.unit else ""
    return go.Heatmap(
        z=scores.mean.astype(np.float32),
        customdata=np.stack([column for _, column, _ in known], -1).astype(np.float32),
        hovertemplate="<br>".join([f"<b>L%{{y}}H%{{x}}</b> %{{z:.3g}}{unit}", *lines])
        + "<extra></extra>",
        hoverongaps=False,
        zmin=low,
        zmax=high,
        colorscale=STYLES[theme].diverging if scores.signed else SEQUENTIAL,
        colorbar={"title": {"text": label(scores.unit), "side": "right"}, "outlinewidth": 0},
        xgap=1 if max(layers, heads) <= 40 else 0,
        ygap=1 if max(layers, heads) <= 40 else 0,
    )


def _limits(scores: HeadScores) -> Limits:
    """First and last value of the colour scale."""
    seen = scores.mean[np.isfinite(scores.mean)]
    if seen.size == 0:
        return (0.0, 1.0)
    if scores.signed:
        reach = float(np.abs(seen).max()) or 1.0
        return (-reach, reach)
    low = float(seen.min()) if scores.bounds[0] is None else scores.bounds[0]
    high = float(seen.max()) if scores.bounds[1] is None else scores.bounds[1]
    return (low, high) if high > low else (low, low + 1.0)


def _axes(figure: go.Figure, layers: int, heads: int, theme: Theme) -> None:
    """Set integer axes with layer 0 on top and square cells."""
    common: dict[str, Any] = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    figure.update_xaxes(
        title_text="head", dtick=_tick(heads), tick0=0, range=[-0.5, heads - 0.5], **common
    )
    figure.update_yaxes(
        title_text="layer", dtick=_tick(layers), tick0=0, range=[layers - 0.5, -0.5], **common
    )


def _unit(scores: HeadScores) -> str:
    """Unit in brackets; none for probabilities, whose colour bar says enough."""
    return f" ({label(scores.unit)})" if scores.unit not in ("", "attention") else ""


def _subtitle(scores: HeadScores) -> str:
    """Subtitle: model, number of examples, and the meaning of grey cells if there are any."""
    parts = [label(scores.provenance.model)] if scores.provenance.model else []
    most = int(scores.n.max(initial=0))
    if most > 1:
        parts.append(f"mean of {most} examples")
    if np.isnan(scores.mean).any():
        parts.append("grey: no value")
    return ", ".join(parts)


def _cell(layers: int, heads: int) -> int:
    """Side of a cell in pixels."""
    return int(min(34, max(9, 420 / max(layers, heads))))


def _tick(n: int) -> int:
    """Tick spacing that gives at most 16 ticks."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, n) if n / step <= 16)


_WIDE_LEFT, _WIDE_RIGHT, _WIDE_TOP, _WIDE_BOTTOM = 76, 96, 66, 56


@checked
def recall_grid(grid: RecallGrid, *, theme: Theme = "light") -> go.Figure:
    """Plot the share of correct answers by length and depth, from 0 to 1; grey: no example.

    Args:
        grid: from ``retrieval.recall_grid()``.
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
            colorbar=colour_bar("share right"),
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
        width=max(
            _WIDE_LEFT + _WIDE_RIGHT + 52 * len(columns), 110 + int(6.3 * len(subtitle)), 420
        ),
        height=max(240, _WIDE_TOP + _WIDE_BOTTOM + 26 * len(rows)),
    )
    figure.update_xaxes(title_text="tokens", type="category", showgrid=False)
    figure.update_yaxes(title_text="depth", type="category", autorange="reversed", showgrid=False)
    figure.update_layout(
        plot_bgcolor=STYLES[theme].missing,
        margin={"l": _WIDE_LEFT, "r": _WIDE_RIGHT, "t": _WIDE_TOP, "b": _WIDE_BOTTOM},
    )
    return figure


def _length(tokens: float) -> str:
    """Format ``2048`` as ``2k``."""
    whole = int(tokens)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)
