"""A plotly figure drawn again by matplotlib: its axes, titles, bands and legend."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.plots.traces import DRAW, PIXELS, Part, colour_of, given, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(figure: go.Figure) -> "Figure":
    """The figure as a matplotlib one, of the same size and colours."""
    from matplotlib.figure import Figure

    _check(figure)
    layout = figure.layout
    width, height = layout.width or 700, layout.height or 450
    canvas = Figure((width / PIXELS, height / PIXELS), facecolor=colour_of(layout.paper_bgcolor))
    ink = colour_of(layout.font.color, "#222222")
    margin = layout.margin
    left, right = given(margin.l, 80) / width, 1 - given(margin.r, 80) / width
    bottom, top = given(margin.b, 80) / height, 1 - given(margin.t, 100) / height

    def place(x: Part, y: Part) -> tuple[Part, Part]:
        return left + x * (right - left), bottom + y * (top - bottom)

    axes: dict[tuple[str, str], Axes] = {}
    for trace in figure.data:
        key = (trace.xaxis or "x", trace.yaxis or "y")
        if key not in axes:
            x_axis, y_axis = (_axis(layout, name) for name in key)
            x0, y0 = place(x_axis.domain[0], y_axis.domain[0])
            x1, y1 = place(x_axis.domain[1], y_axis.domain[1])
            axes[key] = canvas.add_axes((x0, y0, x1 - x0, y1 - y0))
            axes[key].set_facecolor(colour_of(layout.plot_bgcolor))
        DRAW[trace.type](axes[key], trace, ink)
    if not axes:
        raise InputError("the figure is empty: it has no trace to draw.")
    for key, area in axes.items():
        _finish(area, _axis(layout, key[0]), _axis(layout, key[1]), ink)
    _shapes(next(iter(axes.values())), figure)
    if layout.showlegend:
        _legend(next(iter(axes.values())), layout.legend.orientation == "v", ink)
    for note in layout.annotations:
        words: dict[str, Part] = {"color": ink, "ha": "center", "va": "bottom", "fontsize": 9.5}
        if note.xref == "paper":
            canvas.text(*place(note.x, note.y), plain(note.text), **words)
        else:
            area = axes.get((note.xref or "x", note.yref or "y"), next(iter(axes.values())))
            area.text(note.x, note.y, plain(note.text), **words)
    _title(canvas, layout, left, height, ink)
    return canvas


def _check(figure: go.Figure) -> None:
    """Refuse what would be drawn differently from what plotly shows.

    Raises:
        InputError: naming the part.
    """
    bars: set[tuple[str, str]] = set()
    for trace in figure.data:
        if trace.type not in DRAW:
            raise InputError(f"a {trace.type!r} trace can only be saved as .html.")
        if trace.type != "bar":
            continue
        if trace.orientation == "h":
            raise InputError("horizontal bars can only be saved as .html.")
        key = (trace.xaxis or "x", trace.yaxis or "y")
        if key in bars and figure.layout.barmode != "overlay":
            raise InputError("bars of several traces in one panel can only be saved as .html.")
        bars.add(key)
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if axis.overlaying:
            raise InputError("an axis that overlays another can only be saved as .html.")


def _finish(area: "Axes", x: Part, y: Part, ink: str) -> None:
    """Titles, ranges, ticks and grid of one panel."""
    from matplotlib.ticker import NullFormatter

    area.set_xlabel(plain(x.title.text), color=ink, fontsize=9.5)
    area.set_ylabel(plain(y.title.text), color=ink, fontsize=9.5)
    area.tick_params(colors=ink, labelsize=8, length=2)
    for spine in area.spines.values():
        spine.set_visible(False)
    for axis, low_high, setter in ((x, x.range, area.set_xlim), (y, y.range, area.set_ylim)):
        if low_high is not None and axis.type not in ("category", "log"):
            setter(*low_high)
    for axis, side, scale in ((x, area.xaxis, area.set_xscale), (y, area.yaxis, area.set_yscale)):
        if axis.type == "log":
            scale("log")
            side.set_minor_formatter(NullFormatter())
        if axis.tickvals is not None:
            side.set_ticks(list(axis.tickvals), [plain(str(one)) for one in axis.ticktext])
        elif axis.dtick and axis.range is not None:
            side.set_ticks(np.arange(0, max(axis.range), axis.dtick))
        if axis.showgrid is not False:
            side.grid(visible=True, color=colour_of(axis.gridcolor, "#e0e0e0"), linewidth=0.7)
    area.set_axisbelow(True)
    if x.tickangle:
        for text in area.get_xticklabels():
            text.set(rotation=-x.tickangle, ha="right", rotation_mode="anchor")


def _shapes(area: "Axes", figure: go.Figure) -> None:
    """Bands and lines that run across the panel."""
    for shape in figure.layout.shapes:
        across = shape.xref is not None and shape.xref.endswith("domain")
        if not across:
            continue
        if shape.type == "rect":
            colour = colour_of(shape.fillcolor, "#cccccc")
            faint = {"alpha": given(shape.opacity, 1), "linewidth": 0, "zorder": 1}
            area.axhspan(shape.y0, shape.y1, color=colour, **faint)
        elif shape.type == "line":
            dots = ":" if shape.line.dash == "dot" else "-"
            area.axhline(shape.y0, color=colour_of(shape.line.color), lw=1, ls=dots, zorder=2.5)


def _legend(area: "Axes", upright: bool, ink: str) -> None:
    """Names of the traces that have one: above the panel to the right, or upright beside it."""
    area.legend(
        loc="upper left" if upright else "lower right",
        bbox_to_anchor=(1.01, 1.0) if upright else (1.0, 1.0),
        ncols=1 if upright else 6,
        frameon=False,
        fontsize=8.5,
        labelcolor=ink,
    )


def _title(canvas: "Figure", layout: Part, left: Part, height: Part, ink: str) -> None:
    canvas.text(left, 1 - 14 / height, plain(layout.title.text), color=ink, fontsize=13, va="top")
    below = plain(layout.title.subtitle.text)
    canvas.text(left, 1 - 38 / height, below, color=ink, fontsize=9, va="top", alpha=0.8)


def _axis(layout: Part, name: str) -> Part:
    """Layout of the axis that a trace calls ``x2``."""
    axis = layout[f"{name[0]}axis{name[1:]}"]
    if axis.domain is not None:
        return axis
    return go.layout.XAxis(axis.to_plotly_json() | {"domain": [0, 1]})
