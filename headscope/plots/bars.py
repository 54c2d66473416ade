"""The best heads of one score, as bars."""

import numpy as np
import plotly.graph_objects as go

from headscope.base.statistics import interval_of_sem
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import HeadScores


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
