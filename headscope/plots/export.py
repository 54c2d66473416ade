"""Figures as files. Pictures for papers are drawn by matplotlib: plotly's own way needs Chrome."""

import re
import warnings
from io import BytesIO
from os import PathLike
from pathlib import Path

import plotly.graph_objects as go

from headscope.errors import HeadscopeWarning, InputError
from headscope.files import whole_file
from headscope.plots.drawing import draw
from headscope.plots.traces import PIXELS, unpacked

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
    # Nobody's own settings leak in, and ours do not leak out; no date, so same in, same bytes out.
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
