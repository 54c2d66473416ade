"""Loss by the token's place in the text, one line per variant of a model."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import TokenLosses

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def token_losses(losses: TokenLosses, *, window: int = 1, theme: Theme = "light") -> go.Figure:
    """Mean loss over texts of every token; the whole model in grey, below the others' colours.

    Args:
        losses: of :func:`headscope.retrieval.token_losses`.
        window: tokens that each point is a running mean of.
        theme: ``light`` or ``dark``.

    Example:
        >>> losses = hs.retrieval.token_losses(model, probe)
        >>> [line.name for line in hs.plots.token_losses(losses, window=4).data]
        ['whole model']
    """
    colours = (STYLES[theme].muted, *_COLOURS)
    figure = Figure()
    for number, (arm, values) in enumerate(zip(losses.arms, losses.mean, strict=True)):
        known = np.flatnonzero(np.isfinite(values))
        smooth = _running(values[known], max(1, window))
        figure.add_scatter(
            x=known[len(known) - len(smooth) :].tolist(),
            y=smooth.tolist(),
            name=label(arm),
            mode="lines",
            line={"color": colours[number % len(colours)], "width": 2},
            hovertemplate=f"<b>{label(arm)}</b><br>token %{{x}}: %{{y:.3g}}<extra></extra>",
        )
    said = [label(losses.model)] if losses.model else []
    said.append(f"mean of {losses.losses.shape[1]} texts")
    said += [f"running mean of {window} tokens"] if window > 1 else []
    beside = 64 + 8 * max(map(len, losses.arms))
    dress(
        figure,
        theme,
        title="Loss by place in the text",
        subtitle=", ".join(said),
        width=560 + beside,
        height=400,
    )
    figure.update_xaxes(title_text="token", zeroline=False)
    figure.update_yaxes(title_text="loss (nats)", zeroline=False)
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        margin={"l": 70, "r": beside, "t": 76, "b": 60},
    )
    return figure


def _running(values: Float[np.ndarray, " token"], window: int) -> Float[np.ndarray, " point"]:
    """Mean of each value and those before it."""
    if len(values) < window:
        return values
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
