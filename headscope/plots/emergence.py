"""Heads appearing along training, above the losses of the model."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from headscope.errors import InputError
from headscope.plots.figure import Figure
from headscope.plots.style import STYLES, Theme, dress
from headscope.plots.text import label
from headscope.table import Emergence

# Okabe and Ito 2008, less yellow and black: told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def emergence(
    story: Emergence,
    scores: Sequence[str] | None = None,
    *,
    theme: Theme = "light",
) -> go.Figure:
    """Scores against training step, the head that is best at the end in bold; losses below.

    Steps lie on a logarithmic axis; step 0 stands left of the first other one, at half of it.
    Thin lines are the other heads. Bands are two standard errors of a curve's mean.

    Args:
        story: of :func:`headscope.emergence`.
        scores: which; default: those with bounds, at most six.
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
        raise InputError("there is no score to draw.")
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
    """Where steps lie on a logarithmic axis, and what stands below them where there is room."""
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
