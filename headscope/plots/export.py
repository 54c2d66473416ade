"""Figures as files. Pictures for papers are drawn by matplotlib: plotly's own way needs Chrome."""

from os import PathLike
from pathlib import Path

import plotly.graph_objects as go

from headscope.errors import InputError
from headscope.plots.drawing import draw
from headscope.plots.traces import PIXELS

_PAPER = (".png", ".svg", ".pdf")


def save(figure: go.Figure, path: "str | PathLike[str]", *, scale: float = 2.0) -> None:
    """Write a figure; the ending of the name says how.

    ``.html`` is the interactive picture, whole in one file that fetches nothing. ``.png``,
    ``.svg`` and ``.pdf`` are drawn by matplotlib (extra ``paper``) from the figure's heatmaps,
    bars, lines and points.

    Args:
        figure: from headscope, or one of your own of those kinds.
        path: of the file.
        scale: pixels of a ``.png`` per pixel of the figure.

    Example:
        >>> hs.plots.save(hs.plots.heatmap(table["induction"]), "induction.html")
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
        drawn.savefig(target, dpi=PIXELS * scale, metadata=dated.get(kind))
