"""Every notebook runs from start to end, and its .ipynb is built from its source."""

from pathlib import Path

import jupytext
import nbformat
import pytest

from notebooks.build import build, errors

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.fixture(scope="module")
def ran() -> dict[Path, nbformat.NotebookNode]:
    """Every notebook as it is after a run, in one kernel for all."""
    return dict(zip(SOURCES, build(SOURCES), strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs(source: Path, ran: dict[Path, nbformat.NotebookNode]) -> None:
    notebook = ran[source]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not errors(notebook), errors(notebook)[0]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


def test_a_notebook_has_no_names_of_the_one_before(tmp_path: Path) -> None:
    first, second = tmp_path / "01_first.py", tmp_path / "02_second.py"
    first.write_text("# %%\nname = 1\nname\n")
    second.write_text("# %%\nname\n\n# %%\n2\n")
    made = build([first, second])
    assert not errors(made[0])
    (wrong,) = errors(made[1])
    assert "NameError" in wrong
    assert made[1].cells[1].outputs[0].data["text/plain"] == "2"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_built_notebook_is_of_this_source(source: Path) -> None:
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    written = jupytext.read(source)
    assert [cell.source for cell in built.cells] == [cell.source for cell in written.cells]
    assert any(cell.get("outputs") for cell in built.cells)
