"""How pictures look: two themes, colour-blind-safe maps, nothing global."""

from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.colors import get_colorscale

Theme = Literal["light", "dark"]
Scale = list[tuple[float, str]]


@dataclass(frozen=True)
class Style:
    """Colours of one theme."""

    paper: str
    text: str
    grid: str
    missing: str
    accent: str
    muted: str
    diverging: Scale


def _steps(colours: str) -> Scale:
    """Colours at even distances."""
    each = colours.split()
    return [(i / (len(each) - 1), colour) for i, colour in enumerate(each)]


# viridis and both diverging maps keep their order of lightness under colour blindness.
SEQUENTIAL: Scale = [(float(at), str(colour)) for at, colour in get_colorscale("viridis")]

STYLES: dict[Theme, Style] = {
    "light": Style(
        paper="#ffffff",
        text="#24292f",
        grid="#e3e6ea",
        missing="#c9ced4",
        accent="#2a6fb0",
        muted="#aab2bc",
        diverging=_steps("#0b3c6f #3f87c1 #b4d3e9 #f7f7f7 #f6c3a1 #d3633f #7a0f22"),
    ),
    "dark": Style(
        paper="#14171c",
        text="#d7dce2",
        grid="#2d333b",
        missing="#4a515b",
        accent="#5aa9e6",
        muted="#59626e",
        diverging=_steps("#9fd0ff #4a90d9 #1f4a78 #14171c #7a3520 #e07b4a #ffd0a8"),
    ),
}


def dress(
    figure: go.Figure, theme: Theme, *, title: str, subtitle: str, width: int, height: int
) -> go.Figure:
    """Give a figure its title, size and theme; titles are already escaped."""
    style = STYLES[theme]
    axis: dict[str, Any] = {
        "gridcolor": style.grid,
        "zerolinecolor": style.grid,
        "linecolor": style.grid,
        "ticks": "",
        "title": {"font": {"size": 13}},
    }
    figure.update_layout(
        title={
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 12}},
            "x": 0.0,
            "xref": "paper",
            "y": 1.0,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 14},
            "font": {"size": 17},
        },
        font={"family": "system-ui, sans-serif", "size": 12, "color": style.text},
        paper_bgcolor=style.paper,
        plot_bgcolor=style.paper,
        width=width,
        height=height,
        template="none",
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
