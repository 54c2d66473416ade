"""Scores of heads beside each other: the best as bars, two scores as points."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.statistics import interval_of_sem, rank_correlation
from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress, label, layer_marker
from headscope.table import HeadScores
from headscope.table.notable import best_heads


def ranking(
    scores: HeadScores, k: int = 20, *, level: float = 0.95, theme: Theme = "light"
) -> go.Figure:
    """The k best heads, with intervals and the band in which the nulls lie.

    Best means largest, or for a score with a sign farthest from 0. The interval is that of
    ``scores.interval``; where the examples were not kept, Student's t of the standard error. The
    band holds the middle 95% of all heads' means on the control.

    Args:
        scores: of a model.
        k: number of bars.
        level: of the interval.
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
    return figure


def scatter(a: HeadScores, b: HeadScores, *, named: int = 3, theme: Theme = "light") -> go.Figure:
    """Mean of every head on ``b`` over its mean on ``a``, coloured by layer.

    The subtitle gives Spearman's rank correlation over heads.

    Args:
        a: score on the horizontal axis.
        b: score on the vertical axis.
        named: how many of the best heads of each score carry their name.
        theme: ``light`` or ``dark``.

    Example:
        >>> figure = hs.plots.scatter(table["previous_token"], table["induction"])
        >>> len(figure.data[0].x) == model.shape.n_layers * model.shape.n_heads
        True
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"{a.name!r} and {b.name!r} are not of one model.")
    known = np.isfinite(a.mean) & np.isfinite(b.mean)
    labels = a.labels[known].tolist()
    names = set(map(str, best_heads([a, b], named)))
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
    return figure


def _places(
    x: Float[np.ndarray, " head"], y: Float[np.ndarray, " head"], wanted: list[bool]
) -> list[str]:
    """Where each wanted name goes, above or below its point; nowhere if both are taken."""
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
