"""Every notebook runs from start to end, and its .ipynb is built from its source."""

from pathlib import Path

import jupytext
import nbformat
import pytest

from notebooks.build import build

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs(source: Path) -> None:
    notebook = build(source)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert outputs
    assert not [out for out in outputs if out.output_type == "error"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_built_notebook_is_of_this_source(source: Path) -> None:
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    written = jupytext.read(source)
    assert [cell.source for cell in built.cells] == [cell.source for cell in written.cells]
    assert any(cell.get("outputs") for cell in built.cells)
