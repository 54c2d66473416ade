"""Figures as files. Pictures for papers are drawn by matplotlib: plotly's own way needs Chrome."""

import re
from collections.abc import Callable
from html import unescape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from headscope.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Part = Any  # of a plotly figure or a matplotlib one; plotly ships no types

_PIXELS = 96.0  # to the inch, as browsers count
_PAPER = (".png", ".svg", ".pdf")
_TAG = re.compile(r"</?(?:b|i|br|sub|sup|span)\b[^>]*>")


def save(figure: go.Figure, path: "str | PathLike[str]", *, scale: float = 2.0) -> None:
    """Write a figure; the ending of the name says how.

    ``.html`` is the interactive picture, whole in one file that fetches nothing. ``.png``,
    ``.svg`` and ``.pdf`` are drawn by matplotlib (extra ``paper``) from the figure's heatmaps,
    bars, lines and points.

    Args:
        figure: from headscope, or one of your own of those kinds.
        path: of the file.
        scale: pixels of a ``.png`` per pixel of the figure.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind == ".html":
        figure.write_html(target, include_plotlyjs=True, config={"displaylogo": False})
        return
    if kind not in _PAPER:
        raise InputError(f"{target.name!r} should end in .html, .png, .svg or .pdf.")
    try:
        import matplotlib.style as style
        from matplotlib.backends import backend_agg  # noqa: F401  fails here, not half-way
    except ImportError:
        raise InputError(
            f"{kind} needs matplotlib: pip install 'headscope[paper]', or save as .html."
        ) from None
    # Nobody's own settings leak in, and ours do not leak out; no date, so same in, same bytes out.
    with style.context(["default", {"svg.hashsalt": "headscope", "svg.fonttype": "none"}]):
        drawn = draw(figure)
        dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        drawn.savefig(target, dpi=_PIXELS * scale, metadata=dated.get(kind))


def draw(figure: go.Figure) -> "Figure":
    """The figure as a matplotlib one, of the same size and colours."""
    from matplotlib.figure import Figure

    layout = figure.layout
    width, height = layout.width or 700, layout.height or 450
    canvas = Figure((width / _PIXELS, height / _PIXELS), facecolor=_colour(layout.paper_bgcolor))
    ink = _colour(layout.font.color, "#222222")
    margin = layout.margin
    left, right = _or(margin.l, 80) / width, 1 - _or(margin.r, 80) / width
    bottom, top = _or(margin.b, 80) / height, 1 - _or(margin.t, 100) / height

    def place(x: Part, y: Part) -> tuple[Part, Part]:
        return left + x * (right - left), bottom + y * (top - bottom)

    axes: dict[tuple[str, str], Axes] = {}
    for trace in figure.data:
        if trace.type not in _DRAW:
            raise InputError(f"a {trace.type!r} trace can only be saved as .html.")
        key = (trace.xaxis or "x", trace.yaxis or "y")
        if key not in axes:
            x_axis, y_axis = (_axis(layout, name) for name in key)
            x0, y0 = place(x_axis.domain[0], y_axis.domain[0])
            x1, y1 = place(x_axis.domain[1], y_axis.domain[1])
            axes[key] = canvas.add_axes((x0, y0, x1 - x0, y1 - y0))
            axes[key].set_facecolor(_colour(layout.plot_bgcolor))
        _DRAW[trace.type](axes[key], trace, ink)
    for key, area in axes.items():
        _finish(area, _axis(layout, key[0]), _axis(layout, key[1]), ink)
    _shapes(next(iter(axes.values())), figure)
    for note in layout.annotations:
        at = place(note.x, note.y)
        canvas.text(*at, _text(note.text), color=ink, ha="center", va="bottom", fontsize=9.5)
    _title(canvas, layout, left, height, ink)
    return canvas


def _heatmap(area: "Axes", trace: Part, ink: str) -> None:
    z = np.ma.masked_invalid(np.asarray(trace.z, dtype=float))
    x, y = (
        list(range(n)) if side is None else list(side)
        for side, n in ((trace.x, z.shape[1]), (trace.y, z.shape[0]))
    )
    low = float(z.min()) if trace.zmin is None else trace.zmin
    high = float(z.max()) if trace.zmax is None else trace.zmax
    numbers = all(isinstance(one, int | float | np.number) for one in (*x, *y))
    where = (x, y) if numbers else (range(z.shape[1]), range(z.shape[0]))
    mesh = area.pcolormesh(
        *(np.asarray(side, dtype=float) for side in where),
        z,
        cmap=_map(trace.colorscale),
        vmin=low,
        vmax=high,
        shading="nearest",
        edgecolors=area.get_facecolor() if trace.xgap else "none",
        linewidth=0.4 if trace.xgap else 0,
        rasterized=z.size > 10_000,
    )
    if not numbers:
        for axis, names in ((area.xaxis, x), (area.yaxis, y)):
            step = -(-len(names) // 40)
            axis.set_ticks(range(0, len(names), step), [_text(str(one)) for one in names[::step]])
        area.invert_yaxis()
    if trace.showscale is not False:
        _bar(area, mesh, trace.colorbar, ink)


def _map(scale: Part) -> "Colormap":
    """A plotly colour scale as a colour map."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("figure", [tuple(one) for one in scale])


def _bar(area: "Axes", drawn: Part, bar: Part, ink: str) -> None:
    """A colour bar to the right of its panel."""
    canvas = area.get_figure(root=True)
    if canvas is None:
        return
    box = area.get_position()
    pixel = 1 / (canvas.get_size_inches()[0] * _PIXELS)
    cax = canvas.add_axes((box.x1 + 10 * pixel, box.y0, _or(bar.thickness, 14) * pixel, box.height))
    colours = canvas.colorbar(drawn, cax=cax)
    colours.outline.set_visible(False)
    cax.tick_params(colors=ink, labelsize=8, length=2)
    if bar.tickvals is not None:
        colours.set_ticks(list(bar.tickvals), labels=list(bar.ticktext))
    cax.set_ylabel(_text(bar.title.text), color=ink, fontsize=9)


def _bars(area: "Axes", trace: Part, ink: str) -> None:
    error = trace.error_y
    both = None
    if error.array is not None:
        below = error.array if error.arrayminus is None else error.arrayminus
        both = np.nan_to_num(np.stack([np.asarray(below, float), np.asarray(error.array, float)]))
    area.bar(
        [_text(str(one)) for one in trace.x],
        np.asarray(trace.y, float),
        width=0.75,
        color=_colours(trace.marker.color),
        yerr=None if both is None else both.clip(0),
        error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 2},
        zorder=2,
    )


def _points(area: "Axes", trace: Part, ink: str) -> None:
    mode = trace.mode or "lines"
    x, y = trace.x, np.asarray(trace.y, float)
    name = _text(trace.name) or None
    if "lines" in mode:
        area.plot(x, y, color=_colour(trace.line.color, None), label=name, linewidth=1.6)
        if trace.fill == "toself":
            area.fill(x, y, color=_colour(trace.fillcolor, None), linewidth=0)
    if "markers" in mode:
        marker = trace.marker
        kept: dict[str, Any] = {"c": _colours(marker.color)}
        if marker.colorscale is not None:
            kept |= {"cmap": _map(marker.colorscale), "vmin": marker.cmin, "vmax": marker.cmax}
        size = (0.75 * (marker.size or 6)) ** 2
        drawn = area.scatter(x, y, s=size, edgecolors="none", zorder=3, **kept)
        if marker.colorscale is not None:
            _bar(area, drawn, marker.colorbar, ink)
    if "text" in mode:
        where = trace.textposition
        for i, text in enumerate(trace.text):
            below = "bottom" in str(where if isinstance(where, str) else where[i])
            kept = {"va": "top", "xytext": (0, -5)} if below else {"xytext": (0, 4)}
            area.annotate(
                _text(text), (x[i], y[i]), textcoords="offset points", ha="center", fontsize=8,
                color=ink, **kept,
            )  # fmt: skip


_DRAW: dict[str, Callable[["Axes", Any, str], None]] = {
    "heatmap": _heatmap,
    "bar": _bars,
    "scatter": _points,
    "scattergl": _points,
}


def _finish(area: "Axes", x: Part, y: Part, ink: str) -> None:
    """Titles, ranges, ticks and grid of one panel."""
    area.set_xlabel(_text(x.title.text), color=ink, fontsize=9.5)
    area.set_ylabel(_text(y.title.text), color=ink, fontsize=9.5)
    area.tick_params(colors=ink, labelsize=8, length=2)
    for spine in area.spines.values():
        spine.set_visible(False)
    for axis, low_high, setter in ((x, x.range, area.set_xlim), (y, y.range, area.set_ylim)):
        if low_high is not None and axis.type not in ("category", "log"):
            setter(*low_high)
    for axis, side, scale in ((x, area.xaxis, area.set_xscale), (y, area.yaxis, area.set_yscale)):
        if axis.type == "log":
            scale("log")
        if axis.tickvals is not None:
            side.set_ticks(list(axis.tickvals), [_text(str(one)) for one in axis.ticktext])
        elif axis.dtick and axis.range is not None:
            side.set_ticks(np.arange(0, max(axis.range), axis.dtick))
        if axis.showgrid is not False:
            side.grid(visible=True, color=_colour(axis.gridcolor, "#e0e0e0"), linewidth=0.7)
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
            colour = _colour(shape.fillcolor, "#cccccc")
            faint = {"alpha": _or(shape.opacity, 1), "linewidth": 0, "zorder": 1}
            area.axhspan(shape.y0, shape.y1, color=colour, **faint)
        elif shape.type == "line":
            dots = ":" if shape.line.dash == "dot" else "-"
            area.axhline(shape.y0, color=_colour(shape.line.color), lw=1, ls=dots, zorder=2.5)


def _title(canvas: "Figure", layout: Part, left: Part, height: Part, ink: str) -> None:
    canvas.text(left, 1 - 14 / height, _text(layout.title.text), color=ink, fontsize=13, va="top")
    below = _text(layout.title.subtitle.text)
    canvas.text(left, 1 - 38 / height, below, color=ink, fontsize=9, va="top", alpha=0.8)


def _axis(layout: Part, name: str) -> Part:
    """Layout of the axis that a trace calls ``x2``."""
    axis = layout[f"{name[0]}axis{name[1:]}"]
    if axis.domain is not None:
        return axis
    return go.layout.XAxis(axis.to_plotly_json() | {"domain": [0, 1]})


def _text(text: str | None) -> str:
    """A label as plain text; a dollar would start a formula."""
    return unescape(_TAG.sub("", text or "")).replace("$", r"\$")


def _colour(colour: str | None, other: str | None = "white") -> Part:
    """A CSS colour in matplotlib's words."""
    if colour is None:
        return other
    found = re.match(r"rgba?\(([^)]*)\)", colour)
    if not found:
        return colour
    parts = [float(part) for part in found[1].split(",")]
    return (*(part / 255 for part in parts[:3]), *parts[3:])


def _colours(colour: Part) -> Part:
    if colour is None or isinstance(colour, str):
        return _colour(colour, None)
    return [_colour(one) if isinstance(one, str) else one for one in colour]


def _or(value: Part, other: float | int) -> Part:
    return other if value is None else value
