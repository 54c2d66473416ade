"""Run every notebook and write its .ipynb beside its source: ``make notebooks``."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
_CLEAR = "%reset -f"  # between notebooks: no name of the one before is left


def build(sources: Iterable[Path]) -> list[nbformat.NotebookNode]:
    """Run notebooks one after the other in one kernel, which imports torch once for all.

    Figures are kept as plotly's data, without a copy of plotly.js. A cell that fails holds its
    error among its outputs, and the cells after it run all the same.
    """
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    notebooks = [jupytext.read(source) for source in sources]
    whole = nbformat.v4.new_notebook()
    for notebook in notebooks:
        whole.cells += [*notebook.cells, nbformat.v4.new_code_cell(_CLEAR)]
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(
        whole, timeout=300, kernel_name="python3", resources=place, allow_errors=True
    ).execute()
    for notebook in notebooks:
        _tidy(notebook)
    return notebooks


def _tidy(notebook: nbformat.NotebookNode) -> None:
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    for count, cell in enumerate(code, 1):  # the kernel counted on from the notebook before
        for counted in (cell, *cell.outputs):
            if "execution_count" in counted:
                counted.execution_count = count
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # else drawn anew each time
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # warnings of the kernel's own set-up name paths of this computer
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]


def errors(notebook: nbformat.NotebookNode) -> list[str]:
    """What went wrong in the cells of a notebook that has run."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return ["\n".join(out.traceback) for out in outputs if out.output_type == "error"]


if __name__ == "__main__":
    paths = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    for path, made in zip(paths, build(paths), strict=True):
        if wrong := errors(made):
            sys.exit(f"{path.name} does not run:\n{wrong[0]}")
        nbformat.write(made, path.with_suffix(".ipynb"))
        print(path.with_suffix(".ipynb").name)
