"""Figures as files. Pictures for papers are drawn by matplotlib: plotly's own way needs Chrome.

Traces are drawn first, then axes, titles, bands and legend.
"""

import re
import warnings
from base64 import b64decode
from collections.abc import Callable
from html import unescape
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from headscope.base.files import whole_file
from headscope.errors import HeadscopeWarning, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


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


_PAPER = (".png", ".svg", ".pdf")
# Text stays text in all of them: SVG names the font, PDF embeds TrueType, which journals ask for.
_SETTINGS = {
    "svg.hashsalt": "headscope",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
}
# Fonts of other scripts that systems come with; those that are installed stand behind DejaVu Sans.
_WIDE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR"),
    *("Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAexGothic", "IPAGothic"),
    *("TakaoGothic", "Droid Sans Fallback", "Arial Unicode MS", "Hiragino Sans", "PingFang SC"),
    *("Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "MS Gothic", "Malgun Gothic"),
    *("SimHei", "Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "FreeSans", "Segoe UI", "Segoe UI Emoji", "Unifont"),
)


def save(figure: go.Figure, path: "str | PathLike[str]", *, scale: float = 2.0) -> None:
    """Write a figure; the ending of the name says how.

    ``.html`` is the interactive picture, whole in one file that fetches nothing. ``.png``,
    ``.svg`` and ``.pdf`` are drawn by matplotlib (extra ``paper``) from the figure's heatmaps,
    bars, lines and points.

    Args:
        figure: from headscope, or another plotly figure of those kinds.
        path: of the file; a file that stands there is replaced at once, or not at all.
        scale: pixels of a ``.png`` per pixel of the figure.

    Raises:
        InputError: if the ending is unknown, the figure holds something that only ``.html`` can
            show, or the file cannot be written.

    Example:
        >>> hs.plots.save(hs.plots.heatmap(table["induction"]), "induction.html")
    """
    if not isinstance(figure, go.Figure):
        raise InputError(
            f"a plotly Figure can be saved here, not a {type(figure).__name__}: figures of "
            "matplotlib have savefig."
        )
    target = Path(path)
    kind = target.suffix.lower()
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
        file.write(drawn_bytes(figure, kind[1:], scale))


def drawn_bytes(figure: go.Figure, kind: str, scale: float = 2.0) -> bytes:
    """Draw a figure with matplotlib: the bytes of a ``png``, ``svg`` or ``pdf`` file.

    Raises:
        InputError: if it holds something that matplotlib does not draw here.
    """
    import matplotlib.style as style

    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # The user's settings do not leak in, nor ours out; no date, so same in, same bytes out.
    with style.context(["default", _SETTINGS]), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            made = BytesIO()
            figure = unpacked(figure)
            with style.context({"font.family": ["DejaVu Sans", *_fallbacks(figure)]}):
                drawn = draw(figure)
                drawn.savefig(made, format=kind, dpi=PIXELS * scale, metadata=dated.get(kind))
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise InputError(
                f"this figure holds something that only .html can show ({error}): save it as .html."
            ) from error
    _tell(told, drawn_as_text=kind == "svg")
    return made.getvalue()


def _fallbacks(figure: go.Figure) -> list[str]:
    """Installed fonts for what the standard one cannot write, if anything."""
    if figure.to_json().isascii() and "\\u" not in figure.to_json():
        return []
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return [name for name in _WIDE_FONTS if name in there]


def _tell(told: list[warnings.WarningMessage], *, drawn_as_text: bool) -> None:
    """Pass warnings on; those of missing characters become one line, or none in an SVG."""
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
            "become boxes: install one that has, such as Noto Sans CJK, or save as .html.",
            HeadscopeWarning,
            stacklevel=4,
        )
