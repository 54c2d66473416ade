"""Curves: a metric against the number of heads that went, and loss by place in the text."""

from collections.abc import Collection

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.statistics import mean_interval
from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import EffectGrid, TokenLosses

# Okabe and Ito 2008, less yellow and black: told apart by colour-blind readers.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def curves(
    grid: EffectGrid,
    *,
    controls: Collection[str] = (),
    level: float = 0.95,
    theme: Theme = "light",
) -> go.Figure:
    """Mean of the metric along the second axis of a grid, one line per name on the first.

    Every arm has a band: the confidence interval of its mean over examples. Control arms are drawn
    as one grey line, the mean over them, in a grey band from the lowest to the highest of them.
    The dotted line is the unedited run.

    Args:
        grid: with two axes: arms, and steps whose labels are numbers.
        controls: arms that are controls, e.g. ``curve.controls``.
        level: of the intervals.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the grid has another form, or lacks a control.

    Example:
        >>> curve = hs.pruning.pruning_curve(model, probe, counts=[0, 6], random=3)
        >>> [line.name for line in hs.plots.curves(curve.effects, controls=curve.controls).data]
        [None, 'random (3)']
    """
    arms, steps = _axes(grid)
    missing = [name for name in controls if name not in arms]
    if missing:
        raise InputError(f"{grid.name!r} has no arm {missing[0]!r}: it has {', '.join(arms)}.")
    style = STYLES[theme]
    values = grid.per_example + grid.unedited
    low, high = mean_interval(values, level, grid.clusters)
    means = grid.mean + float(np.nanmean(grid.unedited))
    figure = Figure()
    chosen = [i for i, arm in enumerate(arms) if arm in controls]
    if chosen:
        of_them = means[chosen]
        ends = (of_them.min(0), of_them.max(0))
        name = f"random ({len(chosen)})" if len(chosen) > 1 else arms[chosen[0]]
        _line(figure, name, steps, of_them.mean(0), *ends, style.muted)
    colours = iter(LINE_COLOURS * (1 + len(arms) // len(LINE_COLOURS)))
    for i, arm in enumerate(arms):
        if i not in chosen:
            _line(figure, arm, steps, means[i], low[i], high[i], next(colours))
    clean = float(np.nanmean(grid.unedited))
    figure.add_hline(clean, line={"dash": "dot", "width": 1, "color": style.text})
    said = [label(grid.provenance.model)] if grid.provenance.model else []
    said.append(f"{values.shape[-1]} examples, {level:.0%} intervals; dotted: the whole model")
    beside = 64 + 8 * max(len(one.name) for one in figure.data if one.name)  # room for the names
    measured = str(grid.provenance.probe.get("metric", "metric"))
    dress(
        figure,
        theme,
        title=f"{label(measured)} against heads {label(grid.axes[1])}",
        subtitle=", ".join(said),
        width=530 + beside,
        height=420,
    )
    unit = f" ({label(grid.unit)})" if grid.unit else ""
    figure.update_xaxes(title_text=f"heads {label(grid.axes[1])}", zeroline=False)
    figure.update_yaxes(title_text=f"{label(measured)}{unit}", zeroline=False)
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        margin={"l": 70, "r": beside, "t": 76, "b": 60},
    )
    return figure


def _axes(grid: EffectGrid) -> tuple[tuple[str, ...], list[float]]:
    if len(grid.axes) != 2:
        raise InputError(f"curves need a grid of arms by steps; {grid.name!r} has {grid.axes}.")
    try:
        return grid.labels[0], [float(step) for step in grid.labels[1]]
    except ValueError:
        raise InputError(f"the steps of {grid.name!r} are not numbers: {grid.labels[1]}.") from None


def _line(
    figure: go.Figure,
    name: str,
    steps: list[float],
    mean: Float[np.ndarray, " step"],
    low: Float[np.ndarray, " step"],
    high: Float[np.ndarray, " step"],
    colour: str,
) -> None:
    """One arm: its band, then its line; steps that it has no value at are left out."""
    there = np.isfinite(mean)
    x = np.asarray(steps)[there].tolist()
    known = np.isfinite(low) & np.isfinite(high) & there
    around = np.asarray(steps)[known]
    if len(around) > 1:
        figure.add_scatter(
            x=[*around.tolist(), *around[::-1].tolist()],
            y=[*low[known].tolist(), *high[known][::-1].tolist()],
            mode="lines",
            fill="toself",
            fillcolor=faint(colour),
            line={"width": 0, "color": faint(colour)},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.add_scatter(
        x=x,
        y=mean[there].tolist(),
        name=label(name),
        mode="lines",
        line={"color": colour, "width": 2},
        hovertemplate=f"<b>{label(name)}</b><br>%{{x}} heads: %{{y:.3g}}<extra></extra>",
    )


def faint(colour: str) -> str:
    """The colour, mostly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


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
    colours = (STYLES[theme].muted, *LINE_COLOURS)
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
