"""Single plotly traces as matplotlib draws them: heatmaps, bars, lines and points."""

import re
from base64 import b64decode
from collections.abc import Callable
from html import unescape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

Part = Any  # of a plotly figure or a matplotlib one; plotly ships no types

PIXELS = 96.0  # to the inch, as browsers count
_TAG = re.compile(r"</?(?:b|i|br|sub|sup|span)\b[^>]*>")


def unpacked(figure: go.Figure) -> go.Figure:
    """The figure with plain arrays: a copied, pickled or loaded one holds them in base64."""
    return go.Figure(_unpacked(figure.to_dict()))


def _unpacked(value: Part) -> Part:
    if isinstance(value, list | tuple):
        return [_unpacked(one) for one in value]
    if not isinstance(value, dict):
        return value
    if {"bdata", "dtype"} <= value.keys():
        flat = np.frombuffer(b64decode(value["bdata"]), value["dtype"])
        shape = [int(size) for size in str(value.get("shape", flat.size)).split(",")]
        return flat.reshape(shape)
    return {name: _unpacked(one) for name, one in value.items()}


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
            axis.set_ticks(range(0, len(names), step), [plain(str(one)) for one in names[::step]])
        area.invert_yaxis()
    if trace.texttemplate:
        _inside(area, mesh, trace, np.asarray(z.filled(low)))
    if trace.showscale is not False:
        _bar(area, mesh, trace.colorbar, ink)


def _inside(area: "Axes", mesh: Part, trace: Part, z: np.ndarray) -> None:
    """Texts in the cells, black or white, whichever shows better on the cell's colour."""
    colours = mesh.cmap(mesh.norm(z))
    bright = colours[..., :3] @ [0.299, 0.587, 0.114] > 0.55
    size = 0.72 * given(trace.textfont.size, 11)
    for at in np.ndindex(z.shape):
        text = plain(str(trace.text[at[0]][at[1]]))
        colour = "#111111" if bright[at] else "#f5f5f5"
        area.text(at[1], at[0], text, color=colour, ha="center", va="center", fontsize=size)


def _map(scale: Part) -> "Colormap":
    """A plotly colour scale as a colour map; plotly's own default where none is given."""
    from matplotlib.colors import LinearSegmentedColormap
    from plotly.colors import get_colorscale

    scale = get_colorscale("plasma") if scale is None else scale
    return LinearSegmentedColormap.from_list("figure", [(at, colour_of(one)) for at, one in scale])


def _bar(area: "Axes", drawn: Part, bar: Part, ink: str) -> None:
    """A colour bar to the right of its panel."""
    canvas = area.get_figure(root=True)
    if canvas is None:
        return
    box = area.get_position()
    pixel = 1 / (canvas.get_size_inches()[0] * PIXELS)
    cax = canvas.add_axes(
        (box.x1 + 10 * pixel, box.y0, given(bar.thickness, 14) * pixel, box.height)
    )
    colours = canvas.colorbar(drawn, cax=cax)
    colours.outline.set_visible(False)
    cax.tick_params(colors=ink, labelsize=8, length=2)
    if bar.tickvals is not None:
        colours.set_ticks(list(bar.tickvals), labels=list(bar.ticktext))
    cax.set_ylabel(plain(bar.title.text), color=ink, fontsize=9)


def _bars(area: "Axes", trace: Part, ink: str) -> None:
    error = trace.error_y
    both = None
    if error.array is not None:
        below = error.array if error.arrayminus is None else error.arrayminus
        both = np.nan_to_num(np.stack([np.asarray(below, float), np.asarray(error.array, float)]))
    x = range(len(trace.y)) if trace.x is None else trace.x
    area.bar(
        [one if isinstance(one, int | float) else plain(str(one)) for one in x],
        np.asarray(trace.y, float),
        width=0.75,
        bottom=None if trace.base is None else np.asarray(trace.base, float),
        color=_colours(trace.marker.color),
        yerr=None if both is None else both.clip(0),
        error_kw={"ecolor": ink, "elinewidth": 1, "capsize": 2},
        zorder=2,
    )


def _points(area: "Axes", trace: Part, ink: str) -> None:
    mode = trace.mode or "lines"
    both = (range(len(trace.y)) if trace.x is None else trace.x, trace.y)
    x, y = (np.asarray(side, float) if _numbers(side) else side for side in both)
    name = None if trace.showlegend is False else plain(trace.name) or None
    alpha = trace.opacity
    if "lines" in mode:
        line: dict[str, Any] = {"color": colour_of(trace.line.color, None), "linewidth": 1.6}
        line["linestyle"] = ":" if trace.line.dash == "dot" else "-"
        if trace.line.width is not None:
            line["linewidth"] = 0.75 * trace.line.width
        area.plot(x, y, label=name, alpha=alpha, **line)
        if trace.fill == "toself":
            faint = {"alpha": alpha, "linewidth": 0, "zorder": 1}
            area.fill(x, y, color=colour_of(trace.fillcolor, None), **faint)
    size = np.asarray(given(trace.marker.size, 6), float)
    if "markers" in mode:
        _markers(area, trace.marker, x, y, size, ink)
    if "text" in mode:
        sizes = np.broadcast_to(size if "markers" in mode else 0.0, len(trace.text))
        for i, text in enumerate(trace.text):
            where = trace.textposition
            kept = _beside(str(where if isinstance(where, str) else where[i]), float(sizes[i]))
            area.annotate(
                plain(text), (x[i], y[i]), textcoords="offset points", fontsize=8, color=ink, **kept
            )


def _markers(area: "Axes", marker: Part, x: Part, y: Part, size: np.ndarray, ink: str) -> None:
    """Points, and their colour bar where they have one."""
    one = marker.color is None or isinstance(marker.color, str)
    kept: dict[str, Any] = {"color" if one else "c": _colours(marker.color)}
    if marker.colorscale is not None:
        kept |= {"cmap": _map(marker.colorscale), "vmin": marker.cmin, "vmax": marker.cmax}
    if marker.opacity is not None:
        kept["alpha"] = marker.opacity
    edge: dict[str, Any] = {"edgecolors": "none"}
    if marker.line.width:
        edge = {"edgecolors": colour_of(marker.line.color), "linewidths": 0.75 * marker.line.width}
    area.scatter(x, y, s=(0.75 * size) ** 2, zorder=3, **edge, **kept)
    if marker.colorscale is not None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(marker.cmin, marker.cmax), kept["cmap"])
        _bar(area, scale, marker.colorbar, ink)


def _beside(where: str, size: float) -> dict[str, Any]:
    """How a text stands beside its point: plotly's words in matplotlib's."""
    away = 3 + 0.3 * size
    down = "bottom" in where
    side = {"right": "left", "left": "right"}.get(where.split()[-1], "center")
    shift = {"left": 3.0, "right": -3.0}.get(side, 0.0)
    return {
        "va": "top" if down else "bottom",
        "ha": side,
        "xytext": (shift, -away if down else away),
    }


def _numbers(values: Part) -> bool:
    return all(one is None or isinstance(one, int | float | np.number) for one in values)


DRAW: dict[str, Callable[["Axes", Any, str], None]] = {
    "heatmap": _heatmap,
    "bar": _bars,
    "scatter": _points,
    "scattergl": _points,
}


def plain(text: str | None) -> str:
    """A label as plain text; a dollar would start a formula."""
    return unescape(_TAG.sub("", text or "")).replace("$", r"\$")


def colour_of(colour: str | None, other: str | None = "white") -> Part:
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
        return colour_of(colour, None)
    return [colour_of(one) if isinstance(one, str) else one for one in colour]


def given(value: Part, other: float | int) -> Part:
    """The value, or another one where plotly leaves it to itself."""
    return other if value is None else value
