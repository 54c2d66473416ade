"""Line plots: metrics against edited heads, losses by position, training curves, layers."""

from collections.abc import Collection, Sequence
from math import ceil

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from headscope.base.arguments import checked
from headscope.base.result import counted
from headscope.base.statistics import mean_interval
from headscope.errors import InputError
from headscope.plots.figure import STYLES, Figure, Theme, captioned, dress, label
from headscope.table import EffectGrid, Emergence, TokenLosses
from headscope.table.lens import LayerTable

# Okabe and Ito 2008, less yellow and black: told apart by colour-blind readers.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@checked
def curves(
    grid: EffectGrid,
    *,
    controls: Collection[str] = (),
    level: float = 0.95,
    theme: Theme = "light",
) -> go.Figure:
    """Plot the metric against the number of edited heads, one line per arm.

    Every arm has a band: the confidence interval of its mean over examples. Control arms are drawn
    as a single grey line, their mean, in a grey band from the lowest to the highest. The dotted
    line is the unedited run.

    Args:
        grid: effects with two axes: arms, and steps whose labels are numbers.
        controls: arms that are controls, e.g. ``curve.controls``.
        level: confidence level of the intervals.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the grid has other axes, or lacks a control.

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
        _line(figure, name, steps, of_them.mean(0), *ends, style.muted, strength=0.3)
    colours = iter(LINE_COLOURS * (1 + len(arms) // len(LINE_COLOURS)))
    for i, arm in enumerate(arms):
        if i not in chosen:
            _line(figure, arm, steps, means[i], low[i], high[i], next(colours))
    clean = float(np.nanmean(grid.unedited))
    figure.add_hline(clean, line={"dash": "dot", "width": 1, "color": style.text})
    said = [label(grid.provenance.model)] if grid.provenance.model else []
    said.append(f"{counted(values.shape[-1])}, {level:.0%} intervals; dotted: the whole model")
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
    captioned(
        figure,
        grid.provenance,
        n=counted(values.shape[-1]),
        method=f"{grid.name}, mean {measured} of each arm with its {level:.0%} interval",
        more=[f"grey band: lowest to highest of {len(chosen)} random controls"] if chosen else [],
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
    strength: float = 0.18,
) -> None:
    """Traces of one arm: its band, then its line; steps without a value are left out."""
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
            fillcolor=faint(colour, strength),
            line={"width": 0, "color": faint(colour, strength)},
            hoverinfo="skip",
            showlegend=False,
        )
    alone = len(x) == 1  # neither a line nor a band shows a single step
    ends = (high - mean)[there], (mean - low)[there]
    bars = {"type": "data", "array": ends[0].tolist(), "arrayminus": ends[1].tolist()}
    figure.add_scatter(
        x=x,
        y=mean[there].tolist(),
        name=label(name),
        mode="markers" if alone else "lines",
        marker={"color": colour, "size": 8},
        error_y={**bars, "color": colour} if alone else None,
        line={"color": colour, "width": 2},
        hovertemplate=f"<b>{label(name)}</b><br>%{{x}} heads: %{{y:.3g}}<extra></extra>",
    )


def faint(colour: str, strength: float = 0.18) -> str:
    """Make a colour mostly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{strength})"


@checked
def token_losses(losses: TokenLosses, *, window: int = 1, theme: Theme = "light") -> go.Figure:
    """Plot the mean loss of every token position; the whole model in grey, below the others.

    Args:
        losses: from :func:`headscope.retrieval.token_losses`.
        window: number of tokens in the running mean.
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
    said.append(f"mean of {counted(losses.losses.shape[1], 'text')}")
    said += [f"running mean of {window} tokens"] if window > 1 else []
    beside = 64 + 8 * max(map(len, losses.arms))
    dress(
        figure,
        theme,
        title="Loss by position in the text",
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
    """Running mean of each value and those before it."""
    if len(values) < window:
        return values
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


# Okabe and Ito 2008, less yellow and black: told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@checked
def emergence(
    story: Emergence,
    scores: Sequence[str] | None = None,
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Plot scores and losses against the training step, with the best final head in bold.

    Steps are on a logarithmic axis; step 0 is drawn at half of the first other step. Thin lines are
    the other heads. Bands are two standard errors of a curve's mean.

    Args:
        story: from :func:`headscope.emergence`.
        scores: names of the scores to plot; default: those with bounds, at most six.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if there is no such score.

    Example:
        >>> story = hs.emergence(checkpoints=["step-000000", "step-005000"], scorers=["induction"])
        >>> type(hs.plots.emergence(story)).__name__
        'Figure'
    """
    last = story.tables[-1]
    chosen = list(scores) if scores is not None else [
        name for name in story.scores if None not in last[name].bounds
    ][: len(_COLOURS)] or list(story.scores)[: len(_COLOURS)]  # fmt: skip
    if not chosen:
        raise InputError("scores= is empty: name at least one.")
    x, ticks = _places(story.steps)
    lower = list(story.losses)
    figure = make_subplots(
        figure=Figure(),
        rows=2 if lower else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08,
        row_heights=[0.6, 0.4] if lower else [1.0],
    )  # fmt: skip
    for colour, name in zip(_COLOURS, chosen, strict=False):
        _heads(figure, story, name, x, colour)
    for i, name in enumerate(lower):
        colour = (STYLES[theme].text, *_COLOURS[::-1])[i % (len(_COLOURS) + 1)]
        _curve(figure, story, name, x, colour, _DASHES[i % len(_DASHES)])
    dress(
        figure,
        theme,
        title=f"{label(story.model)} along training",
        subtitle="bold: the head that is best at the end; thin: the others",
        width=900,
        height=600 if lower else 400,
    )
    figure.update_xaxes(type="log", tickvals=x, ticktext=ticks, zeroline=False, showgrid=True)
    figure.update_xaxes(title_text="training step", row=2 if lower else 1)
    units = {last[name].unit for name in chosen}
    figure.update_yaxes(title_text=label(units.pop()) if len(units) == 1 else "score", row=1)
    if lower:
        units = {story.units.get(name, "") for name in lower}
        figure.update_yaxes(title_text=label(units.pop()) if len(units) == 1 else "", row=2)
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        margin={"l": 64, "r": 190, "t": 78, "b": 56},
    )
    return figure


def _places(steps: Sequence[int]) -> tuple[list[float], list[str]]:
    """Positions of steps on a logarithmic axis, and the tick labels that fit."""
    positive = [step for step in steps if step > 0]
    x = [float(step) if step > 0 else positive[0] / 2 for step in steps]
    ticks: list[str] = []
    before = -np.inf
    for place, step in zip(x, steps, strict=True):
        room = np.log10(place) - before > 0.085
        ticks.append(f"{step:,}" if room else "")
        before = np.log10(place) if room else before
    return x, ticks


def _heads(figure: go.Figure, story: Emergence, name: str, x: list[float], colour: str) -> None:
    values = story.of(name)
    best = story.best(name)
    shown = label(name.replace("_", " "))
    others = np.delete(values.reshape(len(values), -1), best.layer * values.shape[2] + best.head, 1)
    gaps: Float[np.ndarray, "head place"] = np.full((others.shape[1], len(x) + 1), np.nan)
    gaps[:, :-1] = others.T
    figure.add_scatter(
        x=[*x, None] * others.shape[1],
        y=[None if np.isnan(one) else float(one) for one in gaps.ravel()],
        mode="lines", line={"color": colour, "width": 1}, opacity=0.25, hoverinfo="skip",
        showlegend=False, row=1, col=1,
    )  # fmt: skip
    figure.add_scatter(
        x=x,
        y=values[(slice(None), *best)].tolist(),
        name=f"{shown} ({best})",
        mode="lines+markers",
        line={"color": colour, "width": 3}, marker={"size": 6, "color": colour},
        hovertemplate=f"{shown} {best}: %{{y:.3f}}<extra></extra>",
        row=1, col=1,
    )  # fmt: skip


def _curve(
    figure: go.Figure, story: Emergence, name: str, x: list[float], colour: str, dash: str
) -> None:
    mean, sem = story.mean(name), story.sem(name)
    figure.add_scatter(
        x=x,
        y=mean.tolist(),
        error_y={"type": "data", "array": (2 * np.nan_to_num(sem)).tolist(), "thickness": 1},
        name=label(name),
        mode="lines", line={"color": colour, "width": 2, "dash": dash},
        hovertemplate=f"{label(name)}: %{{y:.3f}} nats<extra></extra>",
        row=2, col=1,
    )  # fmt: skip


_COLUMNS = 3
_WIDTH, _HEIGHT = 300, 210  # of a panel, in pixels


@checked
def layers(
    table: LayerTable,
    measures: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    theme: Theme = "light",
) -> go.Figure:
    """Plot measures of layers, each in its own panel, with intervals over texts.

    Args:
        table: from :func:`headscope.geometry.layers`.
        measures: names of measures; None: all.
        level: confidence level of the intervals.
        theme: ``light`` or ``dark``.

    Raises:
        InputError: if the table lacks a measure.

    Example:
        >>> texts = ["The cat sat on the mat. The dog ran.", "A bird sang. The sun came out."]
        >>> table = hs.geometry.layers(model, texts)
        >>> len(hs.plots.layers(table, ["curvature"]).data)
        2
    """
    chosen = [table[name] for name in (table if measures is None else measures)]
    columns = min(_COLUMNS, len(chosen))
    rows = ceil(len(chosen) / columns)
    titles = [f"{label(one.name.replace('_', ' '))} ({label(one.unit)})" for one in chosen]
    figure = make_subplots(
        rows,
        columns,
        figure=Figure(),
        subplot_titles=titles,
        horizontal_spacing=0.09,
        vertical_spacing=0.3 / rows,
    )
    style = STYLES[theme]
    at = np.arange(len(table.places))
    ticks = at[:: max(1, -(-len(at) // 6))]
    for number, measure in enumerate(chosen):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        low, high = measure.interval(level)
        known = np.isfinite(low) & np.isfinite(high)
        figure.add_scatter(
            x=[*at[known].tolist(), *at[known][::-1].tolist()],
            y=[*low[known].tolist(), *high[known][::-1].tolist()],
            mode="lines",
            fill="toself",
            fillcolor=style.grid,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            **place,
        )
        figure.add_scatter(
            x=at.tolist(),
            y=[None if np.isnan(value) else float(value) for value in measure.mean],
            mode="lines+markers",
            line={"color": style.accent, "width": 2},
            marker={"size": 5},
            customdata=list(table.places),
            hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
            showlegend=False,
            **place,
        )
    dress(
        figure,
        theme,
        title="Measures of layers",
        subtitle=_subtitle(table, level),
        width=max(520, 60 + _WIDTH * columns),
        height=110 + _HEIGHT * rows,
    )
    figure.update_xaxes(
        tickvals=ticks.tolist(), ticktext=[table.places[i] for i in ticks], zeroline=False
    )
    figure.update_yaxes(zeroline=False, nticks=5)
    figure.update_annotations(font_size=12)
    figure.update_layout(margin={"l": 55, "r": 20, "t": 100, "b": 40})
    return figure


def _subtitle(table: LayerTable, level: float) -> str:
    texts = max(measure.per_text.shape[1] for measure in table.measures)
    model = f"{label(table.provenance.model)}, " if table.provenance.model else ""
    return f"{model}{counted(texts, 'text')}; mean and {level:.0%} interval after each block"
