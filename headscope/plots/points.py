"""Two scores against each other: every head a point."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.statistics import rank_correlation
from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress, layer_marker
from headscope.plots.text import label
from headscope.table import HeadScores
from headscope.table.notable import best_heads


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
