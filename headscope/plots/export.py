"""Export of figures to files, drawn by matplotlib, since plotly's own export needs Chrome.

Traces are drawn first, then axes, titles, bands and legend.
"""

import re
import warnings
from base64 import b64decode
from collections.abc import Callable
from html import unescape
from io import BytesIO
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.base.files import whole_file
from headscope.errors import HeadscopeWarning, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


Untyped = Any  # a plotly or matplotlib figure; plotly ships no types

PIXELS = 96.0  # pixels per inch, as in browsers
_TAG = re.compile(r"</?(?:b|i|br|sub|sup|span)\b[^>]*>")


def unpacked(figure: go.Figure) -> go.Figure:
    """Convert base64 data in copied, pickled or loaded figures to plain arrays."""
    return go.Figure(_unpacked(figure.to_dict()))


def _copied(figure: go.Figure) -> go.Figure:
    """Copy a figure to draw from, without displaying it."""
    return go.Figure(figure)


def _unpacked(value: Untyped) -> Untyped:
    if isinstance(value, list | tuple):
        return [_unpacked(one) for one in value]
    if not isinstance(value, dict):
        return value
    if {"bdata", "dtype"} <= value.keys():
        flat = np.frombuffer(b64decode(value["bdata"]), value["dtype"])
        shape = [int(size) for size in str(value.get("shape", flat.size)).split(",")]
        return flat.reshape(shape)
    return {name: _unpacked(one) for name, one in value.items()}


def _heatmap(area: "Axes", trace: Untyped, ink: str) -> None:
    z = np.ma.masked_invalid(np.asarray(trace.z, dtype=float))
    x, y = (
        [given(start, 0) + given(step, 1) * at for at in range(n)] if side is None else list(side)
        for side, start, step, n in (
            (trace.x, trace.x0, trace.dx, z.shape[1]),
            (trace.y, trace.y0, trace.dy, z.shape[0]),
        )
    )
    low = float(z.min()) if trace.zmin is None else trace.zmin
    high = float(z.max()) if trace.zmax is None else trace.zmax
    numbers = all(isinstance(one, int | float | np.number) for one in (*x, *y))
    where = (x, y) if numbers else (range(z.shape[1]), range(z.shape[0]))
    mesh = area.pcolormesh(
        *(_edges(np.asarray(side, dtype=float)) for side in where),
        z,
        cmap=_map(trace.colorscale),
        vmin=low,
        vmax=high,
        shading="flat",
        alpha=trace.opacity,
        edgecolors=area.get_facecolor() if trace.xgap else "none",
        linewidth=0.4 if trace.xgap else 0,
        rasterized=z.size > 10_000,
    )
    if not numbers:
        for axis, names in ((area.xaxis, x), (area.yaxis, y)):
            step = -(-len(names) // 40)
            axis.set_ticks(range(0, len(names), step), [plain(str(one)) for one in names[::step]])
        area.invert_yaxis()
    if trace.texttemplate:
        _inside(area, mesh, trace, np.asarray(z.filled(low)))
    if trace.showscale is not False:
        _bar(area, mesh, trace.colorbar, ink)


def _edges(middle: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " edge"]:
    """Where cells begin and end, half-way between their centres; a single cell is 1 wide."""
    if len(middle) == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    between = (middle[1:] + middle[:-1]) / 2
    ends = 2 * middle[[0, -1]] - between[[0, -1]]
    return np.concatenate([ends[:1], between, ends[1:]])


def _inside(area: "Axes", mesh: Untyped, trace: Untyped, z: np.ndarray) -> None:
    """Draw texts in the cells, black or white by contrast with the cell's colour."""
    colours = mesh.cmap(mesh.norm(z))
    bright = colours[..., :3] @ [0.299, 0.587, 0.114] > 0.55
    size = 0.72 * given(trace.textfont.size, 11)
    for at in np.ndindex(z.shape):
        text = plain(str(trace.text[at[0]][at[1]]))
        colour = "#111111" if bright[at] else "#f5f5f5"
        area.text(at[1], at[0], text, color=colour, ha="center", va="center", fontsize=size)


def _map(scale: Untyped) -> "Colormap":
    """Convert a plotly colour scale to a colour map; default: plotly's."""
    from matplotlib.colors import LinearSegmentedColormap
    from plotly.colors import get_colorscale

    scale = get_colorscale("plasma") if scale is None else scale
    return LinearSegmentedColormap.from_list("figure", [(at, colour_of(one)) for at, one in scale])


def _bar(area: "Axes", drawn: Untyped, bar: Untyped, ink: str) -> None:
    """Draw a colour bar to the right of its panel."""
    canvas = area.get_figure(root=True)
    if canvas is None:
        return
    box = area.get_position()
    pixel = 1 / (canvas.get_size_inches()[0] * PIXELS)
    cax = canvas.add_axes(
        (box.x1 + 10 * pixel, box.y0, given(bar.thickness, 14) * pixel, box.height),
        label="<colorbar>",
    )
    colours = canvas.colorbar(drawn, cax=cax)
    colours.outline.set_visible(False)
    cax.tick_params(colors=ink, labelsize=8, length=2)
    if bar.tickvals is not None:
        colours.set_ticks(list(bar.tickvals), labels=list(bar.ticktext))
    cax.set_ylabel(plain(bar.title.text), color=ink, fontsize=9)


def _spread(error: Untyped) -> np.ndarray | None:
    """Lengths of error bars, downwards and upwards; None without any."""
    if error.array is None:
        return None
    below = error.array if error.arrayminus is None else error.arrayminus
    both = np.stack([np.asarray(below, float), np.asarray(error.array, float)])
    lengths: np.ndarray = np.nan_to_num(both).clip(0)
    return lengths


def _bars(area: "Axes", trace: Untyped, ink: str) -> None:
    x = range(len(trace.y)) if trace.x is None else trace.x
    area.bar(
        [one if isinstance(one, int | float) else plain(str(one)) for one in x],
        np.asarray(trace.y, float),
        width=0.75,
        bottom=None if trace.base is None else np.asarray(trace.base, float),
        color=_colours(trace.marker.color),
        yerr=_spread(trace.error_y),
        error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 2},
        zorder=2,
    )


_DASHES: dict[str, Untyped] = {
    "solid": "-",
    "dot": ":",
    "dash": "--",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 2, 3)),
}


def _points(area: "Axes", trace: Untyped, ink: str) -> None:
    mode = trace.mode or "lines"
    both = (range(len(trace.y)) if trace.x is None else trace.x, trace.y)
    x, y = (np.asarray(side, float) if _numbers(side) else side for side in both)
    name = None if trace.showlegend is False else plain(trace.name) or None
    alpha = trace.opacity
    if "lines" in mode:
        line: dict[str, Any] = {"color": colour_of(trace.line.color, None), "linewidth": 1.6}
        line["linestyle"] = _DASHES.get(trace.line.dash or "solid", "-")
        if trace.line.width is not None:
            line["linewidth"] = 0.75 * trace.line.width
        area.plot(x, y, label=name, alpha=alpha, **line)
        if trace.fill == "toself":
            faint = {"alpha": alpha, "linewidth": 0, "zorder": 1}
            area.fill(x, y, color=colour_of(trace.fillcolor, None), **faint)
    size = np.asarray(given(trace.marker.size, 6), float)
    if "markers" in mode:
        _markers(area, trace.marker, x, y, size, ink, None if "lines" in mode else name)
    if (spread := _spread(trace.error_y)) is not None:
        colour = colour_of(trace.error_y.color, None)
        area.errorbar(x, y, spread, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    if "text" in mode:
        sizes = np.broadcast_to(size if "markers" in mode else 0.0, len(trace.text))
        for i, text in enumerate(trace.text):
            where = trace.textposition
            kept = _beside(str(where if isinstance(where, str) else where[i]), float(sizes[i]))
            area.annotate(
                plain(text), (x[i], y[i]), textcoords="offset points", fontsize=8, color=ink, **kept
            )


def _markers(
    area: "Axes",
    marker: Untyped,
    x: Untyped,
    y: Untyped,
    size: np.ndarray,
    ink: str,
    name: str | None,
) -> None:
    """Draw points, with their colour bar if they have one."""
    one = marker.color is None or isinstance(marker.color, str)
    kept: dict[str, Any] = {"color" if one else "c": _colours(marker.color)}
    if marker.colorscale is not None:
        kept |= {"cmap": _map(marker.colorscale), "vmin": marker.cmin, "vmax": marker.cmax}
    if marker.opacity is not None:
        kept["alpha"] = marker.opacity
    edge: dict[str, Any] = {"edgecolors": "none"}
    if marker.line.width:
        edge = {"edgecolors": colour_of(marker.line.color), "linewidths": 0.75 * marker.line.width}
    area.scatter(x, y, s=(0.75 * size) ** 2, zorder=3, label=name, **edge, **kept)
    if marker.colorscale is not None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(marker.cmin, marker.cmax), kept["cmap"])
        _bar(area, scale, marker.colorbar, ink)


def _beside(where: str, size: float) -> dict[str, Any]:
    """Convert a plotly text position to matplotlib alignment."""
    away = 3 + 0.3 * size
    down = "bottom" in where
    side = {"right": "left", "left": "right"}.get(where.split()[-1], "center")
    shift = {"left": 3.0, "right": -3.0}.get(side, 0.0)
    return {
        "va": "top" if down else "bottom",
        "ha": side,
        "xytext": (shift, -away if down else away),
    }


def _numbers(values: Untyped) -> bool:
    return all(one is None or isinstance(one, int | float | np.number) for one in values)


DRAW: dict[str, Callable[["Axes", Any, str], None]] = {
    "heatmap": _heatmap,
    "bar": _bars,
    "scatter": _points,
    "scattergl": _points,
}


def plain(text: str | None) -> str:
    """Convert a label to plain text; a dollar sign would start a formula."""
    return unescape(_TAG.sub("", text or "")).replace("$", r"\$")


def colour_of(colour: str | None, other: str | None = "white") -> Untyped:
    """Convert a CSS colour to matplotlib."""
    if colour is None:
        return other
    found = re.match(r"rgba?\(([^)]*)\)", colour)
    if not found:
        return colour
    parts = [float(part) for part in found[1].split(",")]
    return (*(part / 255 for part in parts[:3]), *parts[3:])


def _colours(colour: Untyped) -> Untyped:
    if colour is None or isinstance(colour, str):
        return colour_of(colour, None)
    return [colour_of(one) if isinstance(one, str) else one for one in colour]


def given(value: Untyped, other: float | int) -> Untyped:
    """The value, or a default for what the figure leaves to plotly."""
    return other if value is None else value


def draw(figure: go.Figure) -> "Figure":
    """Draw a figure in matplotlib, with the same size and colours."""
    from matplotlib.figure import Figure

    _check(figure)
    layout = figure.layout
    width, height = layout.width or 700, layout.height or 450
    canvas = Figure((width / PIXELS, height / PIXELS), facecolor=colour_of(layout.paper_bgcolor))
    ink = colour_of(layout.font.color, "#222222")
    margin = layout.margin
    left, right = given(margin.l, 80) / width, 1 - given(margin.r, 80) / width
    bottom, top = given(margin.b, 80) / height, 1 - given(margin.t, 100) / height

    def place(x: Untyped, y: Untyped) -> tuple[Untyped, Untyped]:
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
    _images(axes, figure)
    if layout.showlegend:
        _legend(next(iter(axes.values())), layout.legend.orientation == "v", ink)
    for note in layout.annotations:
        words: dict[str, Untyped] = {"color": ink, "ha": "center", "va": "bottom", "fontsize": 9.5}
        if note.xref == "paper":
            canvas.text(*place(note.x, note.y), plain(note.text), **words)
        else:
            area = axes.get((note.xref or "x", note.yref or "y"), next(iter(axes.values())))
            area.text(note.x, note.y, plain(note.text), **words)
    _title(canvas, layout, left, height, ink)
    return canvas


def _check(figure: go.Figure) -> None:
    """Refuse figures that matplotlib would draw differently from plotly.

    Raises:
        InputError: with the unsupported part.
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


def _finish(area: "Axes", x: Untyped, y: Untyped, ink: str) -> None:
    """Draw titles, ranges, ticks and grid of one panel."""
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
        if axis.visible is False:
            side.set_visible(False)
    area.set_axisbelow(True)
    if x.tickangle:
        for text in area.get_xticklabels():
            text.set(rotation=-x.tickangle, ha="right", rotation_mode="anchor")


def _images(axes: "dict[tuple[str, str], Axes]", figure: go.Figure) -> None:
    """Draw pictures below the traces of a panel, at the place that their axes give."""
    from matplotlib.image import imread

    for image in figure.layout.images:
        area = axes.get((image.xref, image.yref))
        if area is None or not str(image.source).startswith("data:image/png;base64,"):
            continue
        shown = imread(BytesIO(b64decode(image.source.partition(",")[2])), format="png")
        left, right = image.x, image.x + image.sizex
        top, bottom = image.y, image.y + image.sizey
        limits = area.get_xlim(), area.get_ylim()
        area.imshow(shown, extent=(left, right, bottom, top), aspect="auto", zorder=0, cmap="gray")
        area.set_xlim(*limits[0])
        area.set_ylim(*limits[1])
        area.set_aspect("equal", anchor="W")


def _shapes(area: "Axes", figure: go.Figure) -> None:
    """Draw bands and lines that span the panel, and frames in it."""
    from matplotlib.patches import Rectangle

    for shape in figure.layout.shapes:
        across = shape.xref is not None and shape.xref.endswith("domain")
        if not across:
            if shape.type == "rect" and shape.fillcolor is None and shape.xref in (None, "x"):
                line = {"edgecolor": colour_of(shape.line.color, "#222222"), "zorder": 3}
                frame = Rectangle(
                    (shape.x0, shape.y0), shape.x1 - shape.x0, shape.y1 - shape.y0, fill=False,
                    linewidth=0.75 * given(shape.line.width, 2), **line,
                )  # fmt: skip
                area.add_patch(frame)
            continue
        if shape.type == "rect":
            colour = colour_of(shape.fillcolor, "#cccccc")
            faint = {"alpha": given(shape.opacity, 1), "linewidth": 0, "zorder": 1}
            area.axhspan(shape.y0, shape.y1, color=colour, **faint)
        elif shape.type == "line":
            dots = ":" if shape.line.dash == "dot" else "-"
            area.axhline(shape.y0, color=colour_of(shape.line.color), lw=1, ls=dots, zorder=2.5)


def _legend(area: "Axes", upright: bool, ink: str) -> None:
    """Draw the legend, above the panel to the right or vertically beside it."""
    area.legend(
        loc="upper left" if upright else "lower right",
        bbox_to_anchor=(1.01, 1.0) if upright else (1.0, 1.0),
        ncols=1 if upright else 6,
        frameon=False,
        fontsize=8.5,
        labelcolor=ink,
    )


def _title(canvas: "Figure", layout: Untyped, left: Untyped, height: Untyped, ink: str) -> None:
    canvas.text(left, 1 - 14 / height, plain(layout.title.text), color=ink, fontsize=13, va="top")
    below = plain(layout.title.subtitle.text)
    canvas.text(left, 1 - 38 / height, below, color=ink, fontsize=9, va="top", alpha=0.8)


def _axis(layout: Untyped, name: str) -> Untyped:
    """Layout of the axis named ``x2`` and so on in a trace."""
    axis = layout[f"{name[0]}axis{name[1:]}"]
    if axis.domain is not None:
        return axis
    return go.layout.XAxis(axis.to_plotly_json() | {"domain": [0, 1]})


# Inches. The two-column page of ICML: columns of 3.25, 0.25 apart. Springer's columns (84 mm) and
# pages (174 mm) are 2% wider, so text is at least 8 points in both.
WIDTHS = {"column": 3.25, "text": 6.75}
DPI = 300
POINTS = 8.0  # size of all text
_EDGE = 3.0  # points around everything
_LEAST = 45.0  # points: the smallest side of the drawn area
_SHORTEST, _TALLEST = 1.6, 8.0  # inches, without title and caption


def at_width(figure: go.Figure, width: str) -> "Figure":
    """Draw a figure for print: title above, caption below, all text at 8 points.

    No information is in colour alone, so that the figure survives greyscale printing and colour
    blindness: lines of other colours get other dashes and at least contrast 3 to the background,
    bars of a second colour are hatched, cells below 0 of a diverging scale carry a dot. The colour
    of points, a layer's number, varies in lightness. A diverging scale is widened until it is
    centred at 0. Overlapping tick labels are thinned, except for names of bars.

    Args:
        figure: a plotly figure with plain arrays, as :func:`unpacked` returns it.
        width: ``column`` (3.25 inches) or ``text`` (6.75 inches).

    Returns:
        A matplotlib figure of exactly that width.

    Raises:
        InputError: if a colour scale is ambiguous in greyscale, or the figure does not fit.
    """
    figure = _copied(figure)
    signed = [_centred(trace) for trace in figure.data]
    layout = figure.layout
    tall = (layout.height or 450) - given(layout.margin.t, 100) + 20
    body = min(max(WIDTHS[width] * tall / (layout.width or 700), _SHORTEST), _TALLEST)
    rows = {trace.yaxis for trace in figure.data}
    for taller in (1.0, 1.3) if len(rows) > 1 else ():  # rows may need more room between them
        try:
            return _printed(figure, signed, width, min(taller * body, _TALLEST))
        except InputError:
            continue
    last = 1.7 if len(rows) > 1 else 1.0
    return _printed(figure, signed, width, min(last * body, _TALLEST))


def _printed(figure: go.Figure, signed: list[bool], width: str, body: float) -> "Figure":
    """Draw with the given height in inches for panels and labels, plus title and caption."""
    figure = _copied(figure)
    layout = figure.layout
    title, below = plain(layout.title.text), plain(layout.title.subtitle.text)
    meta = layout.meta if isinstance(layout.meta, dict) else {}
    ink = colour_of(layout.font.color, "#222222")
    figure.update_layout(
        title=None,
        width=WIDTHS[width] * PIXELS,
        height=body * PIXELS,
        margin={"l": 40, "r": 40, "t": 30, "b": 40},
    )
    canvas = draw(figure)
    for text in canvas.texts[::-1]:
        if not text.get_text():
            text.remove()
    moving = list(canvas.texts)
    said = [_told_apart(area) for area in canvas.axes]
    dotted = [_dots(*both) for both in zip(_panels(canvas), signed, strict=False)]
    if any(dotted):
        said.append("dotted cells: below 0")
    caption = "; ".join(filter(None, [below, plain(meta.get("caption")), *dict.fromkeys(said)]))
    for words in canvas.findobj(_is_text):
        words.set(fontsize=POINTS)
    _place(canvas, body, title, caption and f"{caption}.", ink)
    _check_fit(canvas, moving, width)
    return canvas


def _is_text(artist: Untyped) -> bool:
    from matplotlib.text import Text

    return isinstance(artist, Text)


def _panels(canvas: "Figure") -> "list[Axes]":
    """Axes without colour bars, in the order of their traces."""
    return [area for area in canvas.axes if not _is_bar(area)]


def _is_bar(area: "Axes") -> bool:
    return area.get_label() == "<colorbar>"


def lightness(colour: str) -> float:
    """CIE 1976 lightness L* of a CSS colour, from 0 (black) to 100 (white).

    Source: CIE 015:2018, section 8.2.1; sRGB by IEC 61966-2-1.

    Example:
        >>> round(lightness("#777777"), 1)
        50.0
    """
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour_of(colour)))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = float(linear @ [0.2126, 0.7152, 0.0722])
    return 116 * y ** (1 / 3) - 16 if y > (6 / 29) ** 3 else y * (29 / 3) ** 3


def _diverges(scale: Untyped) -> bool:
    """Whether a colour scale is diverging; False if it is sequential.

    Raises:
        InputError: if it is neither, so that two values share a grey.
    """
    from plotly.colors import sample_colorscale

    colours = sample_colorscale([list(step) for step in scale], np.linspace(0, 1, 33).tolist())
    steps = np.diff([lightness(one) for one in colours])

    def one_way(some: Untyped) -> bool:
        return bool((some >= -0.5).all() or (some <= 0.5).all())

    if one_way(steps):
        return False
    if one_way(steps[:16]) and one_way(steps[16:]):
        return True
    raise InputError(
        "the figure's colour scale gives different values one lightness, which a grey print cannot "
        "tell apart: use a sequential scale such as viridis, or one that diverges from its middle."
    )


def _centred(trace: Untyped) -> bool:
    """Whether the trace has a diverging scale, which is widened to be centred at 0."""
    if trace.type != "heatmap":
        scale = trace.marker.colorscale
        if scale is not None:
            _diverges(scale)
        return False
    if trace.colorscale is None or not _diverges(trace.colorscale):
        return False
    z = np.asarray(trace.z, dtype=float)
    z = z[np.isfinite(z)]
    ends = (trace.zmin, trace.zmax)
    found = [z.min() if z.size else 0.0, z.max() if z.size else 0.0]
    reach = max(abs(float(given(one, own))) for one, own in zip(ends, found, strict=True)) or 1.0
    trace.update(zmin=-reach, zmax=reach)
    return True


def _dots(area: "Axes", signed: bool) -> bool:
    """Mark cells below 0, whose greys equal those above."""
    if not signed or not area.collections:
        return False
    mesh: Untyped = area.collections[0]
    z = np.ma.filled(mesh.get_array(), np.nan)
    corners = mesh.get_coordinates()
    middle = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    below = z < 0
    colours = mesh.cmap(mesh.norm(np.nan_to_num(z)))[below]
    bright = colours[:, :3] @ [0.299, 0.587, 0.114] > 0.5
    inks = np.where(bright, "#111111", "#f5f5f5").tolist()
    x, y = middle[below].T
    area.scatter(x, y, s=1.5, c=inks, linewidths=0, zorder=3)
    return bool(below.any())


def _told_apart(area: "Axes") -> str:
    """Give lines and bars of other colours other dashes and hatches, with a legend."""
    from matplotlib.colors import to_hex

    lines = area.get_lines()
    named = [line for line in lines if not str(line.get_label()).startswith("_")]
    colours = list(dict.fromkeys(to_hex(line.get_color()) for line in named))
    looks = {(str(line.get_linestyle()), str(line.get_marker())) for line in named}
    if len(looks) < len(named):
        for line in lines:
            if to_hex(line.get_color()) in colours:
                at = colours.index(to_hex(line.get_color()))
                line.set_linestyle(list(_DASHES.values())[at % len(_DASHES)])
    for line in named:
        line.set_color(_darkened(line.get_color(), area.get_facecolor()))
    bars = [bar for container in area.containers for bar in getattr(container, "patches", [])]
    fills = list(dict.fromkeys(to_hex(bar.get_facecolor()) for bar in bars))
    if len(fills) == 1:
        return ""
    for bar in bars:
        at = fills.index(to_hex(bar.get_facecolor()))
        if at:
            bar.set(hatch="/" * 4 if at == 1 else "." * 3, edgecolor=area.get_facecolor())
    grey = [one for one in fills[1:] if np.ptp([int(one[i : i + 2], 16) for i in (1, 3, 5)]) < 24]
    return "grey bars are hatched, too" if grey else ""


def contrast_ratio(colour: str, ground: str) -> float:
    """Contrast ratio of two colours, from 1 (equal) to 21 (black on white).

    Source: W3C, Web Content Accessibility Guidelines 2.1, section 1.4.3.

    Example:
        >>> round(contrast_ratio("#000000", "#ffffff"))
        21
    """
    # Y / Yn from L*, whose definition inverts.
    light = [lightness(one) for one in (colour, ground)]
    bright = [((one + 16) / 116) ** 3 if one > 8 else one * (3 / 29) ** 3 for one in light]
    return float((max(bright) + 0.05) / (min(bright) + 0.05))


def _darkened(colour: Untyped, ground: Untyped) -> Untyped:
    """Darken (or lighten) a colour until a thin line of it is visible (contrast 3)."""
    from matplotlib.colors import to_hex, to_rgb

    end = float(lightness(to_hex(ground)) < 50)
    for share in np.linspace(0, 1, 21):
        red, green, blue = (1 - share) * np.array(to_rgb(colour)) + share * end
        found = to_hex((red, green, blue))
        if contrast_ratio(found, to_hex(ground)) >= 3:
            return found
    return to_hex((end, end, end))


def _place(canvas: "Figure", body: float, title: str, caption: str, ink: str) -> None:
    """Size the canvas for title and caption, and fit the panels between them."""
    wide = canvas.get_size_inches()[0]
    words: dict[str, Any] = {"color": ink, "fontsize": POINTS, "linespacing": 1.15}
    head = canvas.text(0, 0, title, va="top", weight="bold", **words)
    foot = canvas.text(0, 0, caption, va="bottom", **words)
    room = (wide * 72 - 2 * _EDGE) * canvas.dpi / 72
    for text in (head, foot):
        text.set_text(_wrapped(text, room))
    edge = _EDGE * canvas.dpi / 72
    above, below = (
        text.get_window_extent().height + 2 * edge if text.get_text() else edge
        for text in (head, foot)
    )
    tall = body + (above + below) / canvas.dpi
    canvas.set_size_inches(wide, tall)
    head.set_position((_EDGE / 72 / wide, 1 - _EDGE / 72 / tall))
    foot.set_position((_EDGE / 72 / wide, _EDGE / 72 / tall))
    box = (edge, below, wide * canvas.dpi - edge, tall * canvas.dpi - above)
    moving = [text for text in canvas.texts if text not in (head, foot)]
    for _ in range(2):
        for area in canvas.axes:
            _fit_legend(area, box[2] - box[0])
        _fit(canvas, moving, box)
        for area in canvas.axes:
            for axis in (area.xaxis, area.yaxis):
                _thin(axis, bool(area.containers))
    _fit(canvas, moving, box)


def _wrapped(text: Untyped, room: float) -> str:
    """Wrap text to a width in pixels."""
    lines = [""]
    for word in text.get_text().split():
        longer = f"{lines[-1]} {word}".strip()
        text.set_text(longer)
        if lines[-1] and text.get_window_extent().width > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _fit(canvas: "Figure", moving: Untyped, box: tuple[float, float, float, float]) -> None:
    """Move and scale the panels until they and their labels, of fixed size, fill a box.

    Args:
        canvas: canvas of the panels.
        moving: texts that move with the panels.
        box: left, bottom, right and top in pixels.

    Raises:
        InputError: if the labels leave no room.
    """
    from matplotlib.transforms import Bbox

    size = canvas.get_size_inches() * canvas.dpi
    for _ in range(3):
        frame = np.array(Bbox.union([area.get_window_extent() for area in canvas.axes]).extents)
        outer = [text.get_window_extent() for text in moving]
        outer += [one for area in canvas.axes if (one := area.get_tightbbox()) is not None]
        wanted = np.array(box) + frame - Bbox.union(outer).extents
        stretch = (wanted[2:] - wanted[:2]) / (frame[2:] - frame[:2])
        if (wanted[2:] - wanted[:2]).min() < _LEAST * canvas.dpi / 72:
            raise InputError(
                f"the figure's labels of {POINTS:g} points leave no room for its numbers at this "
                "width: use width='text', shorter names or fewer panels."
            )

        def moved(
            at: Untyped, frame: Untyped = frame, wanted: Untyped = wanted, by: Untyped = stretch
        ) -> Untyped:
            return (wanted[:2] + (np.asarray(at) * size - frame[:2]) * by) / size

        for area in canvas.axes:
            (x0, y0), (x1, y1) = (moved(at) for at in area.get_position().get_points())
            area.set_position((x0, y0, x1 - x0, y1 - y0))
        for text in moving:
            text.set_position(tuple(moved(text.get_position())))


def _fit_legend(area: "Axes", room: float) -> None:
    """Place the legend above the panel, in as many columns as fit."""
    old = area.get_legend()
    if old is None:
        return
    handles, names = area.get_legend_handles_labels()
    ink = old.get_texts()[0].get_color() if names else None
    for columns in range(min(6, len(names)), 0, -1):
        legend = area.legend(
            handles,
            names,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=POINTS,
            labelcolor=ink,
            handlelength=2.6,
            columnspacing=1.0,
            borderaxespad=0.2,
        )
        if legend.get_window_extent().width <= 0.85 * room:
            return


def _thin(axis: Untyped, named: bool) -> None:
    """Rotate tick labels, or drop some, until none overlap."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    labels = [one for one in axis.get_ticklabels() if one.get_text() and one.get_visible()]
    if not _touch(axis, labels):
        return
    if axis.axis_name == "x" and named:
        axis.set_tick_params(labelrotation=90)
        for one in labels:
            one.set(rotation=90, ha="center", va="top", rotation_mode="default")
        if _touch(axis, labels):
            raise InputError(
                f"{len(labels)} names of bars do not fit at {POINTS:g} points: draw fewer, or use "
                "width='text'."
            )
        return
    if isinstance(axis.get_major_locator(), FixedLocator):
        at = [one.get_position()[axis.axis_name == "y"] for one in labels]
        texts = [one.get_text() for one in labels]
        step = next(k for k in range(2, len(labels) + 1) if not _touch(axis, labels[::k]))
        axis.set_ticks(at[::step], texts[::step])
    elif type(axis.get_major_locator()).__name__ == "AutoLocator":
        for bins in (5, 4, 3, 2):
            axis.set_major_locator(MaxNLocator(bins))
            if not _touch(axis, axis.get_ticklabels()):
                return


def _touch(axis: Untyped, labels: Untyped) -> bool:
    """Whether two labels in a row overlap; rotated ones need a line's height between them."""
    if len(labels) < 2:
        return False
    boxes = [one.get_window_extent() for one in labels]
    turned = float(np.sin(np.deg2rad(labels[0].get_rotation())))
    if axis.axis_name == "x" and abs(turned) > 0.1:
        at = axis.axes.transData.transform([(one.get_position()[0], 0) for one in labels])[:, 0]
        line = 1.1 * POINTS * axis.get_figure(root=True).dpi / 72
        return bool((np.abs(np.diff(at)) * abs(turned) < line).any())
    side = int(axis.axis_name == "y")
    ends = sorted((box.min[side], box.max[side]) for box in boxes)
    gap = 0.0 if side else 3.0
    return any(b[0] < a[1] + gap for a, b in pairwise(ends))


def _check_fit(canvas: "Figure", moving: Untyped, width: str) -> None:
    """Refuse texts wider than their cells, and overlapping panels.

    Raises:
        InputError: with what does not fit.
    """
    wider = "use width='text'" if width == "column" else "save it as .html"
    for area in _panels(canvas):
        meshes = [one for one in area.collections if hasattr(one, "get_coordinates")]
        if not meshes or not area.texts:
            continue
        rows, columns = np.array(meshes[0].get_coordinates().shape[:2]) - 1
        frame = area.get_window_extent()
        cell = frame.width / columns, frame.height / rows
        boxes = [text.get_window_extent() for text in area.texts]
        if any(box.width > cell[0] or box.height > 1.25 * cell[1] for box in boxes):
            raise InputError(
                f"texts of {POINTS:g} points do not fit the figure's {columns} x {rows} cells: "
                f"{wider}, or draw fewer cells."
            )
    boxes = [text.get_window_extent() for text in moving]
    areas = [(area, area.get_tightbbox()) for area in canvas.axes]
    for i, (one, first) in enumerate(areas):
        others = [box for other, box in areas[:i] if not _belong(one, other)]
        if first is not None and any(_cross(first, other) for other in (*others, *boxes)):
            raise InputError(
                f"the figure's panels run into each other at {POINTS:g} points: {wider}, or "
                "draw fewer panels beside each other."
            )


def _belong(one: "Axes", other: "Axes") -> bool:
    """Whether one is the colour bar next to the other."""
    at, beside = one.get_position(), other.get_position()
    near = min(abs(at.x0 - beside.x1), abs(beside.x0 - at.x1)) < 0.08
    return bool(_is_bar(one) != _is_bar(other) and near and abs(at.y0 - beside.y0) < 1e-6)


def _cross(first: Untyped, second: Untyped) -> bool:
    """Whether two boxes overlap by more than four pixels in width and height."""
    if second is None:
        return False
    return bool((np.minimum(first.max, second.max) - np.maximum(first.min, second.min) > 4).all())


_PAPER = (".png", ".svg", ".pdf")
# Text stays text in all formats: SVG names the font, PDF embeds TrueType, which journals require.
_SETTINGS = {
    "svg.hashsalt": "headscope",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
}
# Common system fonts for other scripts; installed ones are fallbacks for DejaVu Sans.
_WIDE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR"),
    *("Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAexGothic", "IPAGothic"),
    *("TakaoGothic", "Droid Sans Fallback", "Arial Unicode MS", "Hiragino Sans", "PingFang SC"),
    *("Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "MS Gothic", "Malgun Gothic"),
    *("SimHei", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "FreeSans", "Segoe UI", "Segoe UI Emoji", "Unifont"),
)


@checked
def save(
    figure: go.Figure,
    path: "str | PathLike[str]",
    *,
    scale: float = 2.0,
    width: str | None = None,
) -> None:
    """Save a figure in the format given by the file name's extension.

    ``.html`` is the interactive figure in one self-contained file. ``.png``, ``.svg`` and ``.pdf``
    are drawn by matplotlib (extra ``paper``) from the figure's heatmaps, bars, lines and points.

    Args:
        figure: from headscope, or another plotly figure with those kinds of traces.
        path: path of the file; an existing file is replaced atomically.
        scale: pixels of a ``.png`` per pixel of the figure, if no width is given.
        width: printed width for a paper: ``column`` (3.25 inches) or ``text`` (6.75 inches). All
            text is then 8 points, a ``.png`` has 300 dots per inch, and n, seed, method and null
            are in a caption below if the figure has them; see :func:`at_width`.

    Raises:
        InputError: if the extension or the width is unknown, the figure contains something that
            only ``.html`` supports or does not fit the width, or the file cannot be written.

    Example:
        >>> hs.plots.save(hs.plots.heatmap(table["induction"]), "induction.html")
        >>> hs.plots.save(hs.plots.ranking(table["induction"], 5), "best.pdf", width="column")
    """
    if not isinstance(figure, go.Figure):
        raise InputError(
            f"a plotly Figure can be saved here, not a {type(figure).__name__}: figures of "
            "matplotlib have savefig."
        )
    target = Path(path)
    kind = target.suffix.lower()
    _check_width(width, kind, scale)
    if kind == ".html":
        page = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
        with whole_file(target) as file:
            file.write(page.encode())
        return
    if kind not in _PAPER:
        raise InputError(f"{target.name!r} should end in .html, .png, .svg or .pdf.")
    try:
        from matplotlib.backends import backend_agg  # noqa: F401  fails here, not half-way
    except ImportError:
        raise InputError(
            f"{kind} needs matplotlib: pip install 'headscope[paper]', or save as .html."
        ) from None
    with whole_file(target) as file:
        file.write(drawn_bytes(figure, kind[1:], scale, width))


def _check_width(width: str | None, kind: str, scale: float) -> None:
    if width is None:
        return
    if width not in WIDTHS:
        raise InputError(f"width={width!r}: a paper's figure is 'column' or 'text' wide.")
    if kind == ".html":
        raise InputError(
            f"width={width!r} is for .png, .svg and .pdf: an .html page has no printed width."
        )
    if scale != 2.0:
        raise InputError(
            f"scale={scale:g} with width={width!r}: a paper's .png has {DPI} dots per inch, give "
            "one of the two."
        )


def drawn_bytes(
    figure: go.Figure, kind: str, scale: float = 2.0, width: str | None = None
) -> bytes:
    """Draw a figure with matplotlib and return the bytes of a ``png``, ``svg`` or ``pdf`` file.

    Args:
        figure: the figure.
        kind: file format.
        scale: pixels of a ``png`` per pixel of the figure, if no width is given.
        width: for a paper, ``column`` or ``text``.

    Raises:
        InputError: if the figure contains something that is not supported in this format.
    """
    import matplotlib.style as style

    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # Isolate matplotlib's settings in both directions; write no date, so that output is
    # reproducible.
    with style.context(["default", _SETTINGS]), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            made = BytesIO()
            figure = unpacked(figure)
            with style.context({"font.family": ["DejaVu Sans", *_fallbacks(figure)]}):
                drawn = draw(figure) if width is None else at_width(figure, width)
                dpi = PIXELS * scale if width is None else DPI
                drawn.savefig(made, format=kind, dpi=dpi, metadata=dated.get(kind))
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise InputError(
                f"this figure holds something that only .html can show ({error}): save it as .html."
            ) from error
    _tell(told, drawn_as_text=kind == "svg")
    return made.getvalue()


def _fallbacks(figure: go.Figure) -> list[str]:
    """Installed fonts for characters that the default font lacks."""
    if figure.to_json().isascii() and "\\u" not in figure.to_json():
        return []
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return [name for name in _WIDE_FONTS if name in there]


def _tell(told: list[warnings.WarningMessage], *, drawn_as_text: bool) -> None:
    """Re-emit warnings; those about missing characters become one line, or none in an SVG."""
    missing = []
    for one in told:
        found = re.match(r"Glyph (\d+) .*missing from font", str(one.message))
        if found is None:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        else:
            missing.append(chr(int(found[1])))
    missing = list(dict.fromkeys(missing))
    if missing and not drawn_as_text:
        shown = " ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        warnings.warn(
            f"no installed font has {len(missing)} of the picture's characters ({shown}), which "
            "become boxes: install a font that has them, such as Noto Sans CJK, or save as "
            ".html.",
            HeadscopeWarning,
            stacklevel=4,
        )
