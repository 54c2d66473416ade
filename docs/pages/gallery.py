"""Notebooks as pages: the built .ipynb with their outputs, nothing is run."""

import html
import json
from pathlib import Path
from typing import Any

import nbformat

from docs.pages.write import put

_LOADER = '<script src="{root}_static/plotly.min.js"></script>'


def gallery_pages(notebooks: Path, static: Path | None) -> dict[str, str]:
    """Pages by path below ``generated/``.

    Args:
        notebooks: folder with the built notebooks.
        static: where plotly.js goes, once for all pages; None: nowhere.
    """
    files = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    if static is not None:
        from plotly.offline import get_plotlyjs

        put(static / "plotly.min.js", get_plotlyjs())
    pages, lines = {}, []
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        pages[f"gallery/{file.stem}.md"] = _page(notebook, file.stem)
        title, first = _opening(notebook)
        lines.append(f"- [{title}]({file.stem}.md): {first}")
    toc = "\n".join(file.stem for file in files)
    pages["gallery/index.md"] = (
        "# Notebooks\n\nRun from start to end by the tests, on the bundled models, offline. "
        "Sources are in `notebooks/`.\n\n"
        + "\n".join(lines)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n"
    )
    return pages


def _opening(notebook: Any) -> tuple[str, str]:
    """Title and first sentence."""
    told = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title, _, rest = told.strip().partition("\n")
    first = " ".join(rest.strip().split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    return title.lstrip("# "), f"{first}."


def _page(notebook: Any, name: str) -> str:
    parts, drawn = [], 0
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        if cell.source.strip():
            parts.append(f"```python\n{cell.source}\n```")
        for out in cell.get("outputs", []):
            shown, is_figure = _output(out, f"{name}-{number}-{drawn}")
            if is_figure and drawn == 0:
                parts.append(_raw(_LOADER.format(root="../../")))
            drawn += is_figure
            parts.append(shown)
    return "\n\n".join(part for part in parts if part) + "\n"


def _raw(markup: str) -> str:
    fence = "`" * 5
    return f"{fence}{{raw}} html\n{markup}\n{fence}"


def _output(out: Any, name: str) -> tuple[str, bool]:
    """One output as markup, and whether it is a plotly figure."""
    if out.output_type == "stream":
        return _raw(f'<div class="cell-output"><pre>{html.escape(out.text)}</pre></div>'), False
    data = out.get("data", {})
    if figure := data.get("application/vnd.plotly.v1+json"):
        # "<" as \u003c: no string in the figure can end the script.
        told = json.dumps({k: figure[k] for k in ("data", "layout")}).replace("<", "\\u003c")
        return _raw(
            f'<div class="cell-output" id="{name}" role="img" aria-label="figure"></div>\n'
            f'<script>(f => Plotly.newPlot("{name}", f.data, f.layout, '
            f"{{displaylogo: false, responsive: true}}))({told})</script>"
        ), True
    if "text/html" in data:
        return _raw(f'<div class="cell-output">{data["text/html"]}</div>'), False
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        return _raw(f'<img alt="output" src="data:image/png;base64,{picture}">'), False
    if "text/plain" in data:
        return _raw(
            f'<div class="cell-output"><pre>{html.escape(data["text/plain"])}</pre></div>'
        ), False
    return "", False
