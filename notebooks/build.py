"""Run every notebook and write its .ipynb beside its source: ``make notebooks``."""

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def build(source: Path) -> nbformat.NotebookNode:
    """Run one notebook; its figures are kept as plotly's data, without a copy of plotly.js."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    notebook: nbformat.NotebookNode = jupytext.read(source)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # else drawn anew each time
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # warnings of the kernel's own set-up name paths of this computer
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.py")):
        nbformat.write(build(path), path.with_suffix(".ipynb"))
        print(path.with_suffix(".ipynb").name)
