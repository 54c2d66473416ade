"""How pictures look: two themes, colour-blind-safe maps, labels; nothing global.

Names and tokens are data, so nothing in a label may act.
"""

import unicodedata
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.colors import get_colorscale, sample_colorscale

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
    modes: dict[str, str]


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
        modes={"Q": "#0072b2", "K": "#d55e00", "V": "#009e73"},
    ),
    "dark": Style(
        paper="#14171c",
        text="#d7dce2",
        grid="#2d333b",
        missing="#4a515b",
        accent="#5aa9e6",
        muted="#59626e",
        diverging=_steps("#9fd0ff #4a90d9 #1f4a78 #14171c #7a3520 #e07b4a #ffd0a8"),
        modes={"Q": "#56b4e9", "K": "#f0843c", "V": "#2fc79a"},
    ),
}


def layer_colours(layers: int, theme: Theme) -> list[str]:
    """One colour per layer, from the part of the map that stands out from the paper."""
    ends = {"light": (0.0, 0.92), "dark": (0.3, 1.0)}[theme]
    at = [ends[0] + (ends[1] - ends[0]) * layer / max(1, layers - 1) for layer in range(layers)]
    return [str(colour) for colour in sample_colorscale("viridis", at)]


def layer_marker(layers: int, theme: Theme) -> dict[str, Any]:
    """Marker whose colour is a layer number, with a colour bar of whole layers."""
    shown = list(range(0, layers, -(-layers // 12)))
    colours = layer_colours(max(2, layers), theme)
    return {
        "colorscale": [(i / (len(colours) - 1), colour) for i, colour in enumerate(colours)],
        "cmin": 0,
        "cmax": max(1, layers - 1),
        "colorbar": {
            "title": {"text": "layer", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": shown,
            "ticktext": [str(layer) for layer in shown],
        },
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


_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣", "\x7f": "␡"}
# Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Zl and Zp separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Text with everything that does not show made to show, so that no label can lie.

    Line breaks, tabs and outer spaces become signs; control, zero-width and direction characters
    become their number, such as ``⟨202E⟩``.

    Examples:
        >>> visible(" the\n")
        '␣the↵'
    """
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    trail = len(text) - lead - len(inner)
    return _MARKS[" "] * lead + "".join(map(_mark, inner)) + _MARKS[" "] * trail


def label(text: str, limit: int = 60) -> str:
    """Text for plotly, which reads tags and entities in every label: escaped, shown, cut."""
    shown = visible(text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    # %{ would start a variable in a hover template.
    return escape(shown, quote=False).replace("%{", "%&#123;")


def _mark(character: str) -> str:
    if character in _MARKS and character != " ":
        return _MARKS[character]
    if unicodedata.category(character) in _INVISIBLE:
        return f"⟨{ord(character):04X}⟩"
    return character
