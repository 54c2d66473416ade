"""Spectra: singular values with the band of chance, and eigenvalues in the complex plane."""

from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress, label, layer_colours, layer_marker
from headscope.table import HeadEigenvalues, HeadSpectra

_FLOOR = 1e-3  # smaller values are rounding, or not worth the room on a logarithmic axis


def spectra(
    values: HeadSpectra,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    named: int = 3,
    theme: Theme = "light",
) -> go.Figure:
    """Singular values of every head: one line each, coloured by layer.

    Every head is drawn in units of the largest singular value that random factors of its own
    shape and variance would give, so that one band serves all: what stands above it was learned.

    Args:
        values: of :func:`headscope.circuits.spectra`.
        heads: those to draw in colour, the others in grey; default: all in colour.
        named: how many of the heads with the largest first value carry their name.
        theme: ``light`` or ``dark``.

    Example:
        >>> type(hs.plots.spectra(hs.circuits.spectra(model))).__name__
        'Figure'
    """
    style = STYLES[theme]
    relative = np.where(values.relative >= _FLOOR, values.relative, np.nan)
    layers, n_heads, rank = relative.shape
    chosen = None if heads is None else {HeadIndex.parse(head) for head in heads}
    colours = layer_colours(layers, theme)
    place = np.arange(1, rank + 1)
    figure = Figure(
        go.Scatter(
            x=np.concatenate([place, place[::-1]]),
            y=np.concatenate([values.high, values.low[::-1]]).clip(_FLOOR),
            mode="lines",
            fill="toself",
            fillcolor=style.missing,
            opacity=0.6,
            line={"width": 0, "color": "rgba(0,0,0,0)"},
            hoverinfo="skip",
        )
    )
    for layer in range(layers):
        for mine in (False, True):
            some = [
                head
                for head in range(n_heads)
                if (chosen is None or (layer, head) in chosen) is mine
                and np.isfinite(relative[layer, head]).any()
            ]
            if some:
                colour = colours[layer] if mine else style.muted
                figure.add_trace(_lines(relative, layer, some, colour, 1.4 if mine else 0.6))
    for edge in (values.low, values.high):
        dots = {"width": 1, "color": style.text, "dash": "dot"}
        figure.add_trace(
            go.Scatter(x=place, y=edge.clip(_FLOOR), mode="lines", line=dots, hoverinfo="skip")
        )
    figure.add_trace(_names(relative, named, chosen, layer_marker(layers, theme)))
    dress(
        figure,
        theme,
        title=f"{label(values.name)} singular values",
        subtitle=f"{label(values.provenance.model)}; grey band: {label(values.chance, 90)}",
        width=720,
        height=460,
    )
    figure.update_xaxes(title_text="place", range=[0, rank + 1], zeroline=False)
    figure.update_yaxes(
        title_text="singular value / largest by chance",
        type="log",
        zeroline=False,
        **_ticks(relative, values),
    )
    figure.update_layout(showlegend=False, margin={"l": 70, "r": 90, "t": 70, "b": 56})
    return figure


def _lines(
    relative: np.ndarray, layer: int, heads: list[int], colour: str, width: float
) -> go.Scatter:
    """All heads of one layer in one trace, with a gap after each."""
    rank = relative.shape[-1]
    gap = np.full((len(heads), 1), np.nan)
    place = np.broadcast_to(np.arange(1, rank + 1), (len(heads), rank))
    return go.Scatter(
        x=np.hstack([place, gap]).ravel(),
        y=np.hstack([relative[layer, heads], gap]).ravel().astype(np.float32),
        customdata=np.repeat(np.array(heads, dtype=np.int32), rank + 1),
        hovertemplate=f"<b>L{layer}H%{{customdata}}</b><br>place %{{x}}: %{{y:.3g}}<extra></extra>",
        mode="lines",
        line={"width": width, "color": colour},
        connectgaps=False,
    )


def _names(
    relative: np.ndarray, named: int, chosen: set[HeadIndex] | None, marker: dict[str, object]
) -> go.Scatter:
    """Names at the first values of the heads that stand out, and the colour bar of all layers."""
    first = relative[..., 0]
    known = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(np.isfinite(first))]
    known = [head for head in known if chosen is None or head in chosen]
    shown: list[HeadIndex] = []
    for head in sorted(known, key=lambda head: (-first[head], head)):
        room = 0.04 * np.log(np.nanmax(relative) / np.nanmin(relative))
        if len(shown) < named and all(np.log(first[one] / first[head]) > room for one in shown):
            shown.append(head)
    points = max(1, len(shown))
    return go.Scatter(
        x=[1.0] * points,
        y=[float(first[head]) for head in shown] or [np.nan],
        text=[str(head) for head in shown] or [""],
        mode="markers+text",
        textposition="top right",
        textfont={"size": 11},
        cliponaxis=False,
        hoverinfo="skip",
        marker=marker | {"color": [0] * points, "opacity": 0},
    )


def _ticks(relative: np.ndarray, values: HeadSpectra) -> dict[str, object]:
    """1, 2 and 5 of every power of ten that the picture shows."""
    seen = np.concatenate([relative[np.isfinite(relative)], values.high, values.low.clip(_FLOOR)])
    steps = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    shown = [step for step in steps if seen.min() / 1.5 <= step <= seen.max() * 1.5]
    return {"tickvals": shown, "ticktext": [f"{step:g}" for step in shown]}


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
