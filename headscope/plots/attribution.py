"""A logit as a sum: its largest parts one on top of the other, and what each token gave."""

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.figure import Figure
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
