"""headscope's figure class, with static fallbacks for places without plotly.js, and its style."""

import re
import sys
import unicodedata
import warnings
import webbrowser
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import get_colorscale, sample_colorscale
from plotly.io.base_renderers import ExternalRenderer

from headscope.base.specs import Provenance
from headscope.plots.export import drawn_bytes, unpacked

# Errors of plotly's renderers when a dependency is missing: IPython, nbformat (ValueError), kaleido
# and its Chrome, a browser.
_LACKING = (ImportError, OSError, RuntimeError, ValueError, webbrowser.Error)
_TAG = re.compile(r"<[^>]*>")
_MOST_CELLS = 1_500  # of a heatmap that becomes a table
_MOST_ROWS = 20  # of bars
_WAY = (
    "The interactive picture needs plotly where the notebook is shown, and a trusted notebook; "
    'hs.plots.save(figure, "picture.html") writes it to a file that opens offline.'
)


def sentence(figure: go.Figure) -> str:
    """Describe in plain words what a figure shows."""
    layout = figure.layout
    said = [_words(layout.title.text) or "untitled", _words(layout.title.subtitle.text)]
    kinds = list(dict.fromkeys(trace.type for trace in figure.data)) or ["empty"]
    return f"{': '.join(part for part in said if part)} ({', '.join(kinds)})"


def static_html(figure: go.Figure, png: str | None = None) -> str:
    """Render a figure as HTML without scripts or external resources.

    Args:
        figure: the figure.
        png: its picture in base64; None: show its numbers as tables, as far as they fit.
    """
    if png is not None:
        name, width = escape(sentence(figure), quote=True), int(figure.layout.width or 700)
        return f'<img alt="{name}" width="{width}" src="data:image/png;base64,{png}">'
    tables = [_table(trace) for trace in unpacked(figure).data]
    own = (
        "For a static picture here, install matplotlib (pip install 'headscope[paper]'). "
        if not _drawable()
        else ""
    )
    return (
        f"<div><p><strong>{escape(sentence(figure))}</strong></p>{''.join(tables)}"
        f"<p><small>{escape(own + _WAY)}</small></p></div>"
    )


def live_html(static: str, live: str, name: str) -> str:
    """HTML with a script that replaces a static picture with the live one where scripts run.

    Args:
        static: shown if scripts do not run.
        live: shown if they do.
        name: an id that is unique on the page.
    """
    return (
        f'<div id="{name}-static">{static}</div><div id="{name}-live" hidden><script>'
        f'document.getElementById("{name}-static").remove();'
        f'document.getElementById("{name}-live").hidden = false;'
        f"</script>{live}</div>"
    )


def _drawable() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _words(text: str | None) -> str:
    """A title without markup."""
    return " ".join(unescape(_TAG.sub(" ", text or "")).split())


def _table(trace: Any) -> str:
    """Table of the numbers in a heatmap or bars; empty for other figures, and if too large."""
    try:
        if trace.type == "heatmap" and trace.z is not None:
            return _grid(trace)
        if trace.type == "bar" and trace.y is not None:
            return _bars(trace)
    except (TypeError, ValueError, IndexError):  # texts for numbers, rows of several lengths
        pass
    return ""


def _grid(trace: Any) -> str:
    """HTML table of a heatmap: coloured cells with their texts or values."""
    z = np.asarray(trace.z, dtype=float)
    if z.ndim != 2 or not 0 < z.size <= _MOST_CELLS:
        return ""
    rows, columns = (
        [str(i) for i in range(n)] if side is None else [_words(str(one)) for one in side]
        for side, n in ((trace.y, z.shape[0]), (trace.x, z.shape[1]))
    )
    colours = _colours(trace, z)
    told = trace.text if trace.texttemplate and trace.text is not None else z
    body = [
        _row(
            rows[i],
            [
                f'<td style="background-color:{colours[i][j]};color:{_ink(colours[i][j])};'
                f'padding:2px 4px;text-align:right">{escape(_number(told[i][j]))}</td>'
                for j in range(z.shape[1])
            ],
        )
        for i in range(z.shape[0])
    ]
    head = "".join(f"<th>{escape(one)}</th>" for one in columns)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _colours(trace: Any, z: np.ndarray) -> list[list[str]]:
    """Colour of every cell; grey for missing values."""
    known = z[np.isfinite(z)]
    low = trace.zmin if trace.zmin is not None else (known.min() if known.size else 0.0)
    high = trace.zmax if trace.zmax is not None else (known.max() if known.size else 1.0)
    share = np.clip((z - low) / ((high - low) or 1.0), 0, 1)
    scale = [list(step) for step in trace.colorscale or get_colorscale("plasma")]
    sampled = sample_colorscale(scale, np.nan_to_num(share, nan=0.0).ravel().tolist())
    found = np.where(np.isfinite(z).ravel(), np.array(sampled, dtype=object), "rgb(201, 206, 212)")
    return [[str(one) for one in row] for row in found.reshape(z.shape)]


def _ink(colour: str) -> str:
    """Text colour, black or white, by contrast with ``rgb(...)``."""
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", colour)[:3])
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#f5f5f5"


def _bars(trace: Any) -> str:
    """HTML table of the first bars."""
    y = list(trace.y)
    x: Sequence[Any] = range(len(y)) if trace.x is None else list(trace.x)
    named = list(zip(x, y, strict=False))[:_MOST_ROWS]
    rows = [_row(_number(a), [f"<td>{escape(_number(b))}</td>"]) for a, b in named]
    more = f"<p>... and {len(y) - _MOST_ROWS:,} more</p>" if len(y) > _MOST_ROWS else ""
    return f"<table><tbody>{''.join(rows)}</tbody></table>{more}" if rows else ""


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>"


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float | np.floating) else _words(str(value))


_PLOTLY = "application/vnd.plotly.v1+json"


class Figure(go.Figure):  # type: ignore[misc]  # plotly ships no types
    """Plotly figure with a static fallback for notebooks.

    A notebook stores plotly's data, which front ends with plotly display, and a PNG drawn by
    matplotlib (extra ``paper``), or else the figure's numbers as HTML without scripts. So an
    untrusted notebook, a server without plotly and ``nbconvert`` show a picture or a table. Neither
    nbformat nor IPython is needed. Otherwise it behaves like a
    :class:`plotly.graph_objects.Figure`.
    """

    def __repr__(self) -> str:
        """Describe the figure, and how to see it."""
        size = f"{self.layout.width or 700} x {self.layout.height or 450} pixels"
        return (
            f"<Figure {sentence(self)}, {size}: a notebook shows it, "
            'hs.plots.save(figure, "picture.html") writes it>'
        )

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None, validate: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Data for plotly, and fallbacks for front ends without it."""
        try:
            bundle = dict(super()._repr_mimebundle_(include, exclude, validate, **kwargs))
        except _LACKING:  # a renderer that the user chose
            bundle = {}
        if not bundle:
            bundle = pio.renderers["plotly_mimetype"].to_mimebundle(self.to_dict())
        png = bundle.get("image/png") or _png(self)
        static = static_html(self, png)
        if live := bundle.get("text/html"):  # needs scripts, and front ends prefer it to a PNG
            bundle["text/html"] = live_html(static, live, f"headscope-{uuid4().hex}")
        elif png is None:
            bundle["text/html"] = static
        if png is not None:
            bundle["image/png"] = png
        return {**bundle, "text/plain": repr(self)}

    def _repr_html_(self) -> str:
        """HTML of the bundle, or the static picture."""
        bundle = self._repr_mimebundle_()
        return str(bundle.get("text/html") or static_html(self, bundle.get("image/png")))

    def _ipython_display_(self) -> None:
        """Display the figure as the last value of a cell, without nbformat."""
        if not pio.renderers.render_on_display:
            _display({"text/plain": repr(self)}, {})
        elif not _shown_outside(self):
            width, height = self.layout.width or 700, self.layout.height or 450
            about = {"width": width, "height": height, "alt": sentence(self)}  # twice the pixels
            _display(self._repr_mimebundle_(), {"image/png": about})

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show the figure; arguments are those of :func:`plotly.io.show`."""
        if args or kwargs or not _in_ipython():
            super().show(*args, **kwargs)
        else:
            self._ipython_display_()


def _png(figure: go.Figure) -> str | None:
    """The figure as a PNG in base64, drawn by matplotlib; None if that is not possible."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character without a font
            return b64encode(drawn_bytes(figure, "png")).decode("ascii")
    except Exception:  # redrawing any figure can fail, which must not hide plotly's output
        return None


def _display(bundle: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Publish a bundle to the kernel's front end; without a kernel, print its text."""
    if _in_ipython():
        sys.modules["IPython"].display.display(bundle, raw=True, metadata=metadata)
    else:
        sys.stdout.write(f"{bundle['text/plain']}\n")


def _shown_outside(figure: go.Figure) -> bool:
    """Show a figure in the browser or with the user's renderers, if possible."""
    names = (pio.renderers.default or "").split("+")
    if not any(isinstance(pio.renderers[name], ExternalRenderer) for name in names if name):
        return False
    try:
        pio.show(figure)
    except _LACKING:
        return False
    return True


def _in_ipython() -> bool:
    """Whether IPython (kernel or terminal) runs this code."""
    module = sys.modules.get("IPython")
    return module is not None and module.get_ipython() is not None


Theme = Literal["light", "dark"]
ColourScale = list[tuple[float, str]]


@dataclass(frozen=True)
class Style:
    """Colours of one theme."""

    paper: str
    text: str
    grid: str
    missing: str
    accent: str
    muted: str
    diverging: ColourScale
    modes: dict[str, str]


def _steps(colours: str) -> ColourScale:
    """Evenly spaced colours of a scale."""
    each = colours.split()
    return [(i / (len(each) - 1), colour) for i, colour in enumerate(each)]


# viridis and both diverging maps keep their order of lightness under colour blindness.
SEQUENTIAL: ColourScale = [(float(at), str(colour)) for at, colour in get_colorscale("viridis")]

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


def colour_bar(title: str) -> dict[str, Any]:
    """Colour bar beside a heatmap, with its title turned along it."""
    return {"title": {"text": title, "side": "right"}, "thickness": 14, "outlinewidth": 0}


def legend_line(name: str, colour: str) -> go.Scatter:
    """Trace without points that stands in the legend for the lines of a group."""
    return go.Scatter(
        x=[np.nan], y=[np.nan], mode="lines", name=name, legendgroup=name,
        line={"width": 3, "color": colour},
    )  # fmt: skip


def joined_lines(
    curves: Sequence[np.ndarray], group: str, width: float, colour: str, opacity: float
) -> go.Scatter:
    """One trace of many curves ``[point 2]``, with a gap after each."""
    gap = [[np.nan, np.nan]]
    points = np.concatenate([np.vstack([curve, gap]) for curve in curves])
    return go.Scatter(
        x=points[:, 0].round(3),
        y=points[:, 1].round(3),
        mode="lines",
        legendgroup=group,
        showlegend=False,
        line={"width": width, "color": colour},
        opacity=opacity,
        hoverinfo="skip",
    )


def layer_colours(layers: int, theme: Theme) -> list[str]:
    """One colour per layer, from the part of the scale that contrasts with the background."""
    ends = {"light": (0.0, 0.92), "dark": (0.3, 1.0)}[theme]
    at = [ends[0] + (ends[1] - ends[0]) * layer / max(1, layers - 1) for layer in range(layers)]
    return [str(colour) for colour in sample_colorscale("viridis", at)]


def layer_marker(layers: int, theme: Theme) -> dict[str, Any]:
    """Marker style coloured by layer number, with an integer colour bar."""
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


# Pixels up to which a figure is widened for its subtitle.
_WIDEST_SUBTITLE = 640


def dress(
    figure: go.Figure, theme: Theme, *, title: str, subtitle: str, width: int, height: int
) -> go.Figure:
    """Set title, size and theme of a figure; titles must be escaped.

    A figure too narrow for its subtitle is widened, up to the width of a page column.
    """
    style = STYLES[theme]
    width = max(width, min(_WIDEST_SUBTITLE, 80 + round(6.6 * len(unescape(subtitle)))))
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


def captioned(
    figure: go.Figure, provenance: Provenance, *, n: str, method: str, more: Sequence[str] = ()
) -> None:
    """Attach a caption for papers; ``save(..., width=...)`` writes it below the figure.

    Args:
        figure: figure that gets it, in ``layout.meta["caption"]``.
        provenance: provenance of the result: probe, seed and control.
        n: number and kind of the examples, e.g. ``24 examples``.
        method: how the numbers were measured, and which intervals are drawn.
        more: further facts, such as the ends of the null.
    """
    probe = str(provenance.probe.get("kind", ""))
    seed = "none" if provenance.seed is None else str(provenance.seed)
    facts = [f"n = {n}", f"seed: {seed}", f"method: {method}"]
    facts += [f"probe: {probe}"] if probe else []
    facts += [f"control: {provenance.control}"] if provenance.control else []
    figure.update_layout(meta={"caption": "; ".join(label(one, 160) for one in (*facts, *more))})


_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣", "\x7f": "␡"}
# Cc control, Cf format (bidi, zero width), Cs surrogate, Co private, Zl and Zp separators.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Make invisible characters visible, so that no label is misleading.

    Line breaks, tabs and outer spaces become symbols; control, zero-width and direction characters
    become their code, such as ``⟨202E⟩``.

    Examples:
        >>> visible(" the\n")
        '␣the↵'
    """
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    trail = len(text) - lead - len(inner)
    return _MARKS[" "] * lead + "".join(map(_mark, inner)) + _MARKS[" "] * trail


def label(text: str, limit: int = 60) -> str:
    """Escape and truncate text for plotly, which interprets tags and entities in labels."""
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
