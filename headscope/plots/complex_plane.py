"""Eigenvalues of heads in the complex plane."""

from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress, layer_marker
from headscope.plots.text import label
from headscope.table import HeadEigenvalues

_MOST_POINTS = 10_000


def eigenvalues(
    values: HeadEigenvalues,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Eigenvalues of heads, each over the largest modulus of its head, coloured by layer.

    To the right (positive) a token raises itself (OV) or looks for its own like (QK); to the left
    it lowers or avoids it; off the axis, tokens are turned into others. Of models with more than
    10000 eigenvalues only the heads are drawn whose sum is farthest from 0 by its own measure.

    Args:
        values: of :func:`headscope.circuits.eigenvalues`.
        heads: only these.
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
