"""A logit as a sum: its largest parts one on top of the other, and what each token gave."""

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import Attribution

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
    figure = go.Figure(
        go.Bar(
            x=[*(name for name, _ in bars), "logit"],
            y=[*values, split.whole],
            base=[*(ends - values), 0.0],
            marker={"color": [*(up if one >= 0 else down for one in values), style.muted]},
            customdata=[*ends, split.whole],
            hovertemplate="<b>%{x}</b> %{y:+.4g}<br>up to here %{customdata:.4g}<extra></extra>",
        )
    )
    said = [label(split.provenance.model)] if split.provenance.model else []
    said.append(f"position {split.position} {label(split.tokens[-1], 20)}")
    dress(
        figure,
        theme,
        title=f"logit of {_what(split)}",
        subtitle=", ".join(said),
        width=max(460, 130 + 40 * len(values)),
        height=420,
    )
    figure.add_hline(0.0, line={"dash": "dot", "width": 1})
    figure.update_xaxes(title_text="part", type="category", tickangle=-60, showgrid=False)
    figure.update_yaxes(title_text="logits, one part after the other")
    figure.update_layout(bargap=0.2, showlegend=False, margin={"l": 70, "r": 20, "t": 70, "b": 130})
    figure.update_shapes(line_color=style.text, selector={"type": "line"})
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
    figure = go.Figure(
        go.Bar(
            x=names,
            y=shown,
            marker={"color": [up if one >= 0 else down for one in shown]},
            hovertemplate="<b>%{x}</b> %{y:+.4g} logits<extra></extra>",
        )
    )
    said = [label(split.provenance.model)] if split.provenance.model else []
    said.append(f"value of each token moved by {who} to position {split.position}")
    if first:
        said.append(f"the last {_MOST_TOKENS} tokens")
    dress(
        figure,
        theme,
        title=f"logit of {_what(split)}, by source token",
        subtitle=", ".join(said),
        width=max(460, 120 + 30 * len(names)),
        height=380,
    )
    figure.add_hline(0.0, line={"dash": "dot", "width": 1})
    figure.update_xaxes(title_text="token", type="category", tickangle=-60, showgrid=False)
    figure.update_yaxes(title_text="logits")
    figure.update_layout(
        bargap=0.25, showlegend=False, margin={"l": 70, "r": 20, "t": 70, "b": 110}
    )
    figure.update_shapes(line_color=style.text, selector={"type": "line"})
    return figure


def _what(split: Attribution) -> str:
    foil = "" if split.foil is None else f" less {label(split.foil, 20)}"
    return f"{label(split.target, 20)}{foil}"
